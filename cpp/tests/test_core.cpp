// Tests of the core by itself, for sanitizers to watch: arrays have no room to spare on either side.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "r3/collect.hpp"
#include "r3/counts.hpp"
#include "r3/repack.hpp"
#include "r3/routes.hpp"
#include "r3/set_routes.hpp"

namespace {

template <class Action>
std::string error_of(Action action) {
  try {
    action();
  } catch (std::invalid_argument const& error) {
    return error.what();
  }
  return "no error";
}

bool contains(std::string const& text, std::string const& part) { return text.find(part) != std::string::npos; }

// The k-th expert of a token in a layer: distinct for k < K <= E.
template <class Id>
Id expert(std::size_t token, std::size_t layer, std::size_t k, std::size_t num_experts) {
  return static_cast<Id>((token * 5 + layer * 3 + k) % num_experts);
}

// Two samples, of which the second ends in a token that was not captured, in a padded batch with padding.
template <class Id, class Out>
struct Example {
  static constexpr std::size_t kLayers = 3, kLocalLayers = 2, kRoom = 6;
  std::size_t topk, num_experts, stream_from = 0;
  std::vector<std::size_t> lengths = {4, 5};
  std::vector<std::vector<Id>> ids;
  std::vector<std::vector<std::int32_t>> versions, token_ids;
  std::vector<std::int64_t> layers = {2, 0};
  std::vector<r3::Segment> segments = {{0, 0, 6, 0, 2}, {1, 0, 6, 1, 2}};
  std::vector<Out> out;
  std::vector<std::int32_t> row_versions = std::vector<std::int32_t>(2 * kRoom);
  std::vector<std::int64_t> counts, expected = std::vector<std::int64_t>(2 * kRoom, -7);

  Example(std::size_t k, std::size_t e) : topk(k), num_experts(e) {
    for (std::size_t sample = 0; sample < 2; ++sample) {
      versions.emplace_back(lengths[sample], static_cast<std::int32_t>(sample));
      token_ids.emplace_back();
      ids.emplace_back();
      for (std::size_t token = 0; token < lengths[sample]; ++token) {
        token_ids[sample].push_back(static_cast<std::int32_t>(100 * sample + token));
        expected[2 * token + sample] = token_ids[sample][token];
        for (std::size_t i = 0; i < kLayers * k; ++i) {
          ids[sample].push_back(expert<Id>(token + sample, i / k, i % k, e));
        }
      }
    }
    versions[1][4] = -1;
    std::fill(ids[1].end() - static_cast<std::ptrdiff_t>(kLayers * k), ids[1].end(), Id{0});
    out.resize(kLocalLayers * 2 * kRoom * k);
    counts.resize(kLocalLayers * e);
  }

  void repack(std::size_t num_threads) {
    r3::RepackJob<Id, Out> job{.traces = {},
                               .segments = segments,
                               .layer_indices = layers,
                               .num_layers = kLayers,
                               .topk = topk,
                               .num_experts = num_experts,
                               .ep_size = 2,
                               .num_rows = row_versions.size(),
                               .num_threads = num_threads,
                               .out = out.data(),
                               .row_versions = row_versions.data(),
                               .counts = counts.data(),
                               .expected_tokens = expected.data(),
                               .stream_from = stream_from};
    for (std::size_t i = 0; i < 2; ++i) {
      job.traces.push_back({ids[i].data(), versions[i].data(), token_ids[i].data(), lengths[i], {}});
    }
    r3::repack(job);
  }

  // Collects the two local layers from what repack wrote; layer 0 is given in a second shard.
  std::vector<std::vector<Id>> collect(std::size_t num_threads, std::vector<std::int64_t> const& second = {1}) {
    std::vector<std::int64_t> const first = {0};
    std::vector<std::vector<Id>> samples;
    std::vector<std::vector<std::int32_t>> found;
    std::vector<std::int32_t> const names = {7, 9};
    r3::CollectJob<Id> job{.shards = {},
                           .samples = {},
                           .layer_ids = names,
                           .topk = topk,
                           .num_experts = num_experts,
                           .num_threads = num_threads};
    for (std::size_t i = 0; i < 2; ++i) {
      samples.emplace_back(lengths[i] * 2 * topk);
      found.emplace_back(lengths[i]);
    }
    for (std::size_t i = 0; i < 2; ++i) {
      job.samples.push_back({samples[i].data(), found[i]});
      Out const* layer = out.data() + i * row_versions.size() * topk;
      job.shards.push_back({layer, row_versions, i == 0 ? first : second, segments});
    }
    r3::collect(job);
    CHECK(found == versions);
    return samples;
  }
};

template <class Id, class Out>
void test_round_trip(std::size_t topk, std::size_t num_experts) {
  for (std::size_t num_threads : {1, 2, 5, 40}) {
    Example<Id, Out> example(topk, num_experts);
    example.stream_from = num_threads % 2 == 0 ? 0 : std::size_t{1} << 40;
    example.repack(num_threads);
    CHECK((example.row_versions ==
           std::vector<std::int32_t>{0, 1, 0, 1, 0, 1, 0, 1, r3::kPadding, r3::kLive, r3::kPadding, r3::kPadding}));
    for (std::size_t k = 0; k < topk; ++k) {
      CHECK(example.out[3 * topk + k] == static_cast<Out>(expert<Id>(2, 2, k, num_experts)));
      CHECK(example.out[(12 + 2) * topk + k] == static_cast<Out>(expert<Id>(1, 0, k, num_experts)));
      CHECK(example.out[9 * topk + k] == static_cast<Out>(-1));
    }
    CHECK(example.out[8 * topk] == 0);
    CHECK(topk == 1 || example.out[8 * topk + 1] == static_cast<Out>(num_experts / 2));
    std::int64_t sum = 0;
    for (auto count : example.counts) {
      sum += count;
    }
    CHECK(sum == static_cast<std::int64_t>(2 * 11 * topk));
    auto const samples = example.collect(num_threads);
    for (std::size_t i = 0; i < 2; ++i) {
      for (std::size_t cell = 0; cell < samples[i].size(); ++cell) {
        std::size_t const token = cell / (2 * topk), m = cell / topk % 2, k = cell % topk;
        std::size_t const layer = m == 0 ? 2 : 0;
        CHECK(samples[i][cell] == example.ids[i][(token * 3 + layer) * topk + k]);
      }
    }
  }
}

template <class Id, class Out>
void test_all_topk() {
  for (std::size_t topk = 1; topk <= 17; ++topk) {
    test_round_trip<Id, Out>(topk, 18);
    test_round_trip<Id, Out>(topk, 254);
  }
}

void test_refusals() {
  using Small = Example<std::uint8_t, std::int16_t>;
  auto refused = [](auto change) {
    Small example(2, 8);
    change(example);
    return error_of([&] { example.repack(3); });
  };
  CHECK(refused([](Small&) {}) == "no error");
  CHECK(contains(refused([](Small& x) { x.segments.pop_back(); }), "local row 1 of 12 is covered by no segment"));
  CHECK(contains(refused([](Small& x) { x.segments[1].row = 0; }), "local row 0 is covered twice"));
  CHECK(contains(refused([](Small& x) { x.segments[1].length = 7; }), "leave the 12 local rows"));
  CHECK(contains(refused([](Small& x) { x.segments[1].row = INT64_MAX; }), "leave the 12 local rows"));
  CHECK(contains(refused([](Small& x) { x.segments[1].stride = INT64_MAX; }), "leave the 12 local rows"));
  CHECK(contains(refused([](Small& x) { x.segments[1].length = INT64_MAX; }), "leave the 12 local rows"));
  CHECK(contains(refused([](Small& x) { x.segments[1].pos = INT64_MAX; }), "too large"));
  CHECK(contains(refused([](Small& x) { x.segments[1].stride = 0; }), "too small"));
  CHECK(contains(refused([](Small& x) { x.segments[1].sample = 2; }), "sample (2) outside the 2 samples"));
  CHECK(contains(refused([](Small& x) { x.segments[1].sample = -1; }), "sample (-1) outside"));
  CHECK(contains(refused([](Small& x) { x.layers[1] = 3; }), "layer index (3) outside the 3 layers"));
  CHECK(contains(refused([](Small& x) { x.layers[1] = -1; }), "layer index (-1)"));
  CHECK(contains(refused([](Small& x) { x.ids[1][7] = 8; }), "id (8) >= num_experts (8) in the trace of sample 1"));
  CHECK(
      contains(refused([](Small& x) { x.expected[4] = 5; }), "token (2) of the trace of sample 0 at position 2 != 5"));
  CHECK(contains(refused([](Small& x) { x.num_experts = 7; }), "ep_size (2) does not divide num_experts (7)"));

  Small example(2, 8);
  example.repack(1);
  CHECK(contains(error_of([&] { example.collect(1, {0}); }), "sample 0, token 0, layer 7 is held twice"));
  CHECK(contains(error_of([&] { example.collect(1, {2}); }), "layer index (2) of shard 1"));
  example.out[12 * 2 + 2 * 2] = -1;
  CHECK(contains(error_of([&] { example.collect(3); }), "id (-1) of sample 0, token 1, layer 9 is outside 0 to"));
  example.row_versions[11] = 0;
  CHECK(contains(error_of([&] { example.collect(1); }), "sample 1, token 5 is padding"));
}

// More rows than a chunk, in strided and in plain segments, by several threads that share it.
template <class Id, class Out>
void test_many_rows(std::size_t topk) {
  constexpr std::size_t kTokens = 3000, kLayers = 3, kExperts = 200;
  std::vector<Id> ids(kTokens * kLayers * topk);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = expert<Id>(i / topk / kLayers, i / topk % kLayers, i % topk, kExperts);
  }
  std::vector<std::int32_t> versions(kTokens, 1);
  std::vector<std::int32_t> const map = {5, 6};
  versions[17] = -1;
  std::vector<std::int64_t> const layers = {2, 1};
  // The rows from 5000 on are padding, and those before are two samples' in turns.
  std::vector<r3::Segment> const segments = {{0, 3000, 50, 5000, 1}, {0, 0, 2500, 1, 2}, {1, 500, 2500, 0, 2}};
  std::vector<Out> out(2 * 5050 * topk);
  std::vector<std::int32_t> row_versions(5050);
  std::vector<std::int64_t> counts(2 * kExperts), again(2 * kExperts);
  r3::RepackJob<Id, Out> job{.traces = {},
                             .segments = segments,
                             .layer_indices = layers,
                             .num_layers = kLayers,
                             .topk = topk,
                             .num_experts = kExperts,
                             .ep_size = 4,
                             .num_rows = 5050,
                             .num_threads = 3,
                             .out = out.data(),
                             .row_versions = row_versions.data(),
                             .counts = counts.data(),
                             .expected_tokens = nullptr,
                             .stream_from = 0};
  job.traces.push_back({ids.data(), versions.data(), nullptr, kTokens, {}});
  job.traces.push_back({ids.data(), versions.data(), nullptr, kTokens, map});
  r3::repack(job);
  for (std::size_t row = 0; row < 5000; ++row) {
    std::size_t const token = row % 2 == 0 ? 500 + row / 2 : row / 2;
    CHECK(row_versions[row] == (token == 17 ? r3::kLive : row % 2 == 0 ? 6 : 1));
    for (std::size_t i = 0; i < 2 * topk; ++i) {
      auto const want = expert<Id>(token, static_cast<std::size_t>(layers[i / topk]), i % topk, kExperts);
      CHECK(out[(i / topk * 5050 + row) * topk + i % topk] == static_cast<Out>(token == 17 ? -1 : want));
    }
  }
  CHECK(row_versions[5000] == r3::kPadding && out[5000 * topk] == 0);
  r3::count_experts(out.data(), std::span<std::int32_t const>(row_versions), topk, 2, kExperts, again.data());
  CHECK(counts == again);
  CHECK(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}) == static_cast<std::int64_t>(2 * 5049 * topk));
  versions[2999] = 2;
  CHECK(contains(error_of([&] { r3::repack(job); }), "version (2) of sample 1, token 2999 is not one of 2"));
  versions[2999] = 1;
  ids[(2400 * kLayers + 2) * topk] = kExperts;
  CHECK(contains(error_of([&] { r3::repack(job); }), "id (200) >= num_experts (200) in the trace of sample"));
}

template <class Id>
void test_sets(std::size_t num_experts, std::size_t topk) {
  r3::SetShape const shape{7, 3, topk, num_experts};
  std::vector<Id> ids(7 * 3 * topk), again(ids.size());
  std::vector<std::int32_t> const versions = {0, 0, -1, 0, 0, -1, 0};
  for (std::size_t i = 0; i < ids.size(); ++i) {
    bool const captured = versions[i / topk / 3] >= 0;
    ids[i] = captured ? expert<Id>(i / topk / 3, i / topk % 3, topk - 1 - i % topk, num_experts) : Id{0};
  }
  std::size_t const bits = r3::set_bits(num_experts, topk);
  std::vector<std::byte> codes(r3::set_bytes(15, bits));
  r3::encode_sets(shape, ids.data(), std::span(versions), std::span(codes));
  r3::decode_sets(shape, std::span<std::byte const>(codes), std::span(versions), again.data());
  for (std::size_t route = 0; route < 21; ++route) {
    std::sort(ids.begin() + static_cast<std::ptrdiff_t>(route * topk),
              ids.begin() + static_cast<std::ptrdiff_t>((route + 1) * topk));
  }
  CHECK(ids == again);
  auto decode = [&] { r3::decode_sets(shape, std::span<std::byte const>(codes), std::span(versions), again.data()); };
  codes.push_back({});
  CHECK(contains(error_of(decode), "codes: "));
  codes.pop_back();
  if (r3::num_sets(num_experts, topk) - 1 != (r3::Wide{1} << bits) - 1) {
    std::fill_n(codes.begin(), (bits + 7) / 8, std::byte{255});
    CHECK(contains(error_of(decode), "is not below the number of sets"));
  }
}

// A route's rank by its definition.
template <class Id>
r3::Wide plain_rank(std::vector<Id> route) {
  std::ranges::sort(route);
  r3::Wide rank = 0;
  for (std::size_t i = 0; i < route.size(); ++i) {
    rank += route[i] > i ? r3::num_sets(route[i], i + 1) : 0;
  }
  return rank;
}

r3::Wide bits_at(std::vector<std::byte> const& codes, std::size_t first, std::size_t count) {
  r3::Wide value = 0;
  for (std::size_t bit = first; bit < first + count; ++bit) {
    value |= r3::Wide{std::to_integer<unsigned>(codes[bit / 8] >> (bit % 8)) & 1} << (bit - first);
  }
  return value;
}

// Many routes in any order, of runs of captured tokens that are longer and shorter than what is coded at once.
template <class Id>
void test_random_sets(std::size_t num_experts, std::size_t topk) {
  constexpr std::size_t kTokens = 40, kLayers = 5;
  std::mt19937 random(static_cast<unsigned>(num_experts * 16 + topk));
  std::vector<std::int32_t> versions(kTokens);
  std::vector<Id> ids, sorted, all(num_experts);
  std::iota(all.begin(), all.end(), Id{0});
  std::vector<r3::Wide> ranks;
  for (std::size_t token = 0; token < kTokens; ++token) {
    versions[token] = token > 20 && random() % 3 == 0 ? -1 : 0;
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
      std::ranges::shuffle(all, random);
      std::vector<Id> route(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(topk));
      if (versions[token] < 0) {
        route.assign(topk, Id{0});
      } else {
        ranks.push_back(plain_rank(route));
      }
      ids.insert(ids.end(), route.begin(), route.end());
      std::ranges::sort(route);
      sorted.insert(sorted.end(), route.begin(), route.end());
    }
  }
  r3::SetShape const shape{kTokens, kLayers, topk, num_experts};
  std::size_t const bits = r3::set_bits(num_experts, topk);
  std::vector<std::byte> codes(r3::set_bytes(ranks.size(), bits));
  r3::encode_sets(shape, ids.data(), std::span<std::int32_t const>(versions), std::span(codes));
  for (std::size_t route = 0; route < ranks.size(); ++route) {
    CHECK(bits_at(codes, route * bits, bits) == ranks[route]);
  }
  std::vector<Id> again(ids.size());
  r3::decode_sets(shape, std::span<std::byte const>(codes), std::span<std::int32_t const>(versions), again.data());
  CHECK(again == sorted);
  for (std::size_t trial = 0; trial < 60; ++trial) {
    std::size_t const cell = random() % ids.size(), other = cell / topk * topk + random() % topk;
    Id const before = std::exchange(ids[cell], static_cast<Id>(trial % 2 == 0 ? random() : ids[other]));
    bool const bad = r3::find_bad_route(ids.data(), versions.data(), kTokens, kLayers, topk, num_experts).has_value();
    auto const error = error_of(
        [&] { r3::encode_sets(shape, ids.data(), std::span<std::int32_t const>(versions), std::span(codes)); });
    CHECK(bad == contains(error, "a route does not hold distinct ids"));
    ids[cell] = before;
  }
}

void test_all_sets() {
  for (std::size_t topk = 1; topk <= 16; ++topk) {
    for (std::size_t num_experts : {topk, topk + 1, std::size_t{17}, std::size_t{128}, std::size_t{256}}) {
      test_sets<std::uint8_t>(std::max(num_experts, topk), topk);
    }
    test_sets<std::uint16_t>(1024, topk);
    for (std::size_t num_experts : {8, 128, 256}) {
      test_random_sets<std::uint8_t>(std::max(num_experts, topk), topk);
    }
    for (std::size_t num_experts : {256, 512, 1024}) {
      test_random_sets<std::uint16_t>(num_experts, topk);
    }
  }
  // Numbers of sets just below 2^52, up to which ranks are doubles, and above.
  test_random_sets<std::uint16_t>(344, 8);
  test_random_sets<std::uint16_t>(370, 8);
  test_random_sets<std::uint8_t>(171, 10);
  CHECK(contains(error_of([] { r3::set_bits(1025, 8); }), "num_experts (1025) outside 1 to 1024"));
  CHECK(contains(error_of([] { r3::set_bits(64, 17); }), "topk (17) outside 1 to 16"));
}

template <class Id>
void test_routes() {
  for (std::size_t topk = 1; topk <= 17; ++topk) {
    std::vector<Id> ids;
    for (std::size_t i = 0; i < 2 * 3 * topk; ++i) {
      ids.push_back(expert<Id>(0, i / topk, i % topk, 18));
    }
    std::vector<std::int32_t> const versions = {0, 5};
    auto find = [&] { return r3::find_bad_route(ids.data(), versions.data(), 2, 3, topk, 18); };
    CHECK(!find());
    ids.back() = 18;
    CHECK(find() == std::pair(std::size_t{1}, std::size_t{2}));
    ids[topk * 2 - 1] = topk == 1 ? Id{200} : ids[topk];
    CHECK(find() == std::pair(std::size_t{0}, std::size_t{1}));
  }
}

}  // namespace

int main() {
  test_routes<std::uint8_t>();
  test_routes<std::uint16_t>();
  test_all_topk<std::uint8_t, std::uint8_t>();
  test_all_topk<std::uint8_t, std::int16_t>();
  test_all_topk<std::uint16_t, std::int32_t>();
  test_refusals();
  for (std::size_t topk : {1, 2, 3, 4, 6, 8, 10, 16}) {
    test_many_rows<std::uint8_t, std::uint8_t>(topk);
    test_many_rows<std::uint8_t, std::int16_t>(topk);
    test_many_rows<std::uint16_t, std::int32_t>(topk);
  }
  test_all_sets();
  std::puts("all passed");
}
