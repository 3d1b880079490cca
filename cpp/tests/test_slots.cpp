// Tests of the slots of experts, for sanitizers to watch: every way of a lookup gives what the table says.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "r3/counts.hpp"
#include "r3/repack.hpp"

namespace {

template <class Action>
bool refuses(Action action) {
  try {
    action();
  } catch (std::invalid_argument const&) {
    return true;
  }
  return false;
}

void test_lookups() {
  std::vector<r3::LookUp> ways = {r3::find_look_up()};
#if R3_LOOKUPS
  if (__builtin_cpu_supports("avx2")) {
    ways.push_back(&r3::look_up_avx2);
  }
#endif
  std::mt19937 random(1);
  std::vector<std::uint8_t> table(r3::kByteTable), ids(3 * r3::kLookUpBytes);
  std::ranges::generate(table, [&] { return static_cast<std::uint8_t>(random()); });
  std::iota(ids.begin(), ids.end(), std::uint8_t{100});
  auto want = ids;
  r3::look_up_plain(want.data(), want.size(), table.data());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    CHECK(want[i] == table[ids[i]]);
  }
  for (auto way : ways) {
    auto found = ids;
    way(found.data(), found.size(), table.data());
    CHECK(found == want);
  }
}

// Rows with live and padding ones between them, some blocks without any.
template <class Id, class Out>
void test_repack(std::size_t topk, std::size_t num_experts, std::size_t stream_from) {
  constexpr std::size_t kTokens = 1000, kRows = 1004, kLayers = 3;
  std::mt19937 random(static_cast<std::uint32_t>(topk + num_experts));
  std::vector<std::int64_t> const layers = {2, 0};
  std::vector<std::int32_t> slot_of(layers.size() * num_experts), versions(kTokens), row_versions(kRows);
  for (std::size_t m = 0; m < layers.size(); ++m) {
    auto const own = std::span(slot_of).subspan(m * num_experts, num_experts);
    std::iota(own.begin(), own.end(), 0);
    std::ranges::shuffle(own, random);
  }
  std::vector<Id> ids(kTokens * kLayers * topk);
  std::ranges::generate(ids, [&] { return static_cast<Id>(random() % num_experts); });
  versions[777] = -1;
  std::vector<r3::Segment> const segments = {{0, 0, kRows, 0, 1}};
  std::vector<std::int64_t> counts(layers.size() * num_experts), again(counts.size());
  std::vector<Out> out(layers.size() * kRows * topk);
  r3::RepackJob<Id, Out> job{.traces = {},
                             .segments = segments,
                             .layer_indices = layers,
                             .num_layers = kLayers,
                             .topk = topk,
                             .num_experts = num_experts,
                             .ep_size = 2,
                             .num_rows = kRows,
                             .num_threads = 2,
                             .out = out.data(),
                             .row_versions = row_versions.data(),
                             .counts = counts.data(),
                             .expected_tokens = nullptr,
                             .stream_from = stream_from,
                             .slots = r3::SlotTables<Id>(slot_of, num_experts)};
  job.traces.push_back({ids.data(), versions.data(), nullptr, kTokens, {}});
  r3::repack(job);
  for (std::size_t i = 0; i < out.size(); ++i) {
    std::size_t const m = i / topk / kRows, row = i / topk % kRows, k = i % topk;
    if (row == 777) {
      CHECK(out[i] == static_cast<Out>(-1));
    } else if (row < kTokens) {
      auto const expert = ids[(row * kLayers + static_cast<std::size_t>(layers[m])) * topk + k];
      CHECK(out[i] == static_cast<Out>(slot_of[m * num_experts + expert]));
    }
  }
  // Padding takes turns over slots: the first half of them is one rank's.
  CHECK(out[kTokens * topk] == 0 && (topk == 1 || out[kTokens * topk + 1] == static_cast<Out>(num_experts / 2)));
  r3::count_experts(out.data(), std::span<std::int32_t const>(row_versions), topk, layers.size(), num_experts,
                    again.data());
  CHECK(counts == again);
  if (num_experts < std::numeric_limits<Id>::max()) {
    // An expert that there is none of is seen though its slot would be one.
    ids[0] = static_cast<Id>(num_experts);
    CHECK(refuses([&] { r3::repack(job); }));
  }
}

}  // namespace

int main() {
  test_lookups();
  for (std::size_t topk : {1, 4, 5, 8, 16}) {
    for (std::size_t stream_from : {std::size_t{0}, std::size_t{1} << 40}) {
      test_repack<std::uint8_t, std::uint8_t>(topk, 128, stream_from);
      test_repack<std::uint8_t, std::int16_t>(topk, 256, stream_from);
      test_repack<std::uint8_t, std::int64_t>(topk, 60, stream_from);
      test_repack<std::uint16_t, std::int16_t>(topk, 384, stream_from);
      test_repack<std::uint16_t, std::int32_t>(topk, 512, stream_from);
    }
  }
  std::puts("all passed");
}
