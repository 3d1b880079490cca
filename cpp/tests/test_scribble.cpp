// What somebody writes while the core reads it may give wrong routes or an error, but no place outside of the arrays is
// read or written: for the address sanitizer to watch.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <thread>
#include <vector>

#include "r3/collect.hpp"
#include "r3/counts.hpp"
#include "r3/repack.hpp"
#include "r3/routes.hpp"
#include "r3/set_routes.hpp"

namespace {

constexpr std::size_t kTokens = 96, kLayers = 2, kTopk = 3, kExperts = 300, kRounds = 1000;

using Ids = std::vector<std::uint16_t>;
using Numbers = std::vector<std::int32_t>;

Ids good_ids() {
  Ids ids(kTokens * kLayers * kTopk);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = static_cast<std::uint16_t>(i % kExperts);
  }
  return ids;
}

// Calls action again and again while another thread writes good and bad numbers in turn.
template <class Number, class Action>
void scribble(std::vector<Number>& numbers, Number bad, Action action) {
  std::atomic<bool> done = false;
  std::vector<Number> const good = numbers;
  std::thread writer([&] {
    for (std::size_t at = 0; !done; at = (at + 7) % good.size()) {
      *const_cast<Number volatile*>(&numbers[at]) = bad;
      *const_cast<Number volatile*>(&numbers[at]) = good[at];
    }
  });
  for (std::size_t round = 0; round < kRounds; ++round) {
    try {
      action();
    } catch (std::invalid_argument const&) {
      continue;
    }
  }
  done = true;
  writer.join();
  numbers = good;
}

void repack(Ids const& ids, Numbers const& versions, Numbers const& tokens) {
  std::vector<r3::Segment> const segments = {{0, 0, kTokens, 0, 1}};
  std::vector<std::int64_t> const layers = {0, 1};
  std::vector<std::int64_t> const expected(kTokens, 5);
  Ids out(ids.size());
  Numbers row_versions(kTokens);
  std::vector<std::int64_t> counts(kLayers * kExperts);
  r3::RepackJob<std::uint16_t, std::uint16_t> job{.traces = {},
                                                  .segments = segments,
                                                  .layer_indices = layers,
                                                  .num_layers = kLayers,
                                                  .topk = kTopk,
                                                  .num_experts = kExperts,
                                                  .ep_size = 1,
                                                  .num_rows = kTokens,
                                                  .num_threads = 1,
                                                  .out = out.data(),
                                                  .row_versions = row_versions.data(),
                                                  .counts = counts.data(),
                                                  .expected_tokens = expected.data()};
  job.traces.push_back({ids.data(), versions.data(), tokens.data(), kTokens, {}});
  r3::repack(job);
  for (std::uint16_t id : out) {
    if (id >= kExperts && id != 65535) {
      std::fprintf(stderr, "id %u was written\n", unsigned{id});
      std::exit(1);
    }
  }
}

void collect(Ids const& ids) {
  std::vector<r3::Segment> const segments = {{0, 0, kTokens, 0, 1}};
  std::vector<std::int64_t> const layers = {0, 1};
  Numbers const versions(kTokens), names = {0, 1};
  Ids found(ids.size());
  Numbers found_versions(kTokens);
  r3::CollectJob<std::uint16_t> job{
      .shards = {}, .samples = {}, .layer_ids = names, .topk = kTopk, .num_experts = kExperts, .num_threads = 1};
  job.samples.push_back({found.data(), found_versions});
  job.shards.push_back({ids.data(), versions, layers, segments});
  r3::collect(job);
}

void code(Ids const& ids, Numbers const& versions) {
  r3::SetShape const shape{kTokens, kLayers, kTopk, kExperts};
  std::vector<std::byte> codes(r3::set_bytes(r3::count_captured(versions) * kLayers, r3::set_bits(kExperts, kTopk)));
  r3::encode_sets<std::uint16_t>(shape, ids.data(), versions, codes);
}

}  // namespace

int main() {
  Ids ids = good_ids();
  Numbers versions(kTokens), tokens(kTokens, 5);
  std::uint16_t const large = 60000;
  scribble(ids, large, [&] { r3::find_bad_route(ids.data(), versions.data(), kTokens, kLayers, kTopk, kExperts); });
  scribble(ids, large, [&] { repack(ids, versions, tokens); });
  scribble(ids, large, [&] { collect(ids); });
  scribble(ids, large, [&] { code(ids, versions); });
  scribble(ids, large, [&] {
    std::vector<std::int64_t> counts(kLayers * kExperts);
    r3::count_experts<std::uint16_t>(ids.data(), versions, kTopk, kLayers / 2, kExperts, counts.data());
  });
  for (std::int32_t const bad : {-1, -2, 1 << 30}) {
    scribble(versions, bad, [&] { repack(ids, versions, tokens); });
    scribble(versions, bad,
             [&] { r3::find_bad_route(ids.data(), versions.data(), kTokens, kLayers, kTopk, kExperts); });
  }
  scribble(tokens, std::int32_t{6}, [&] { repack(ids, versions, tokens); });
  r3::SetShape const shape{kTokens, kLayers, kTopk, kExperts};
  std::vector<std::byte> codes(r3::set_bytes(kTokens * kLayers, r3::set_bits(kExperts, kTopk)));
  r3::encode_sets<std::uint16_t>(shape, ids.data(), versions, codes);
  scribble(codes, std::byte{255}, [&] {
    Ids found(ids.size());
    r3::decode_sets<std::uint16_t>(shape, codes, versions, found.data());
  });
  std::puts("all passed");
}
