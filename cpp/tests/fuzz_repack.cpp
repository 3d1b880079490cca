// Any segments, layers and ids: refused, or packed without reading or writing elsewhere.
#include "fuzz.hpp"
#include "r3/repack.hpp"

namespace {

template <class Id, class Out>
void repack(Input input) {
  r3::RepackJob<Id, Out> job{.traces = {},
                             .segments = {},
                             .layer_indices = {},
                             .num_layers = input.up_to(3),
                             .topk = 1 + input.up_to(16),
                             .num_experts = 0,
                             .ep_size = 1 + input.up_to(4),
                             .num_rows = input.up_to(40),
                             .num_threads = 1 + input.up_to(2),
                             .out = nullptr,
                             .row_versions = nullptr,
                             .counts = nullptr,
                             .expected_tokens = nullptr,
                             .stream_from = input.up_to(1)};
  job.num_experts = job.topk + input.up_to(std::numeric_limits<Id>::max() - job.topk);
  std::vector<std::int64_t> layers(input.up_to(4));
  std::ranges::generate(layers, [&] { return input.wild() % 8; });
  auto const segments = input.segments();
  std::vector<std::vector<Id>> ids;
  std::vector<std::vector<std::int32_t>> versions, tokens, maps;
  std::size_t const num_traces = 1 + input.up_to(2);
  for (std::size_t i = 0; i < num_traces; ++i) {
    std::size_t const length = input.up_to(12);
    versions.push_back(input.numbers<std::int32_t>(length));
    tokens.push_back(input.numbers<std::int32_t>(length));
    maps.push_back(input.numbers<std::int32_t>(input.up_to(3)));
    ids.push_back(input.numbers<Id>(length * job.num_layers * job.topk));
    bool const pad_last = length > 0 && input.up_to(1) == 1;
    job.traces.push_back({ids[i].data(), versions[i].data(), tokens[i].data(), length, maps[i], pad_last});
  }
  std::vector<std::int64_t> expected(job.num_rows), counts(layers.size() * job.num_experts);
  std::vector<std::int32_t> row_versions(job.num_rows);
  std::vector<Out> out(layers.size() * job.num_rows * job.topk);
  job.segments = segments;
  job.layer_indices = layers;
  job.out = out.data();
  job.row_versions = row_versions.data();
  job.counts = input.up_to(1) == 0 ? nullptr : counts.data();
  job.expected_tokens = input.up_to(1) == 0 ? nullptr : expected.data();
  accepted([&] { r3::repack(job); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  Input input(data, size);
  switch (input.up_to(3)) {
    case 0:
      repack<std::uint8_t, std::uint8_t>(input);
      break;
    case 1:
      repack<std::uint8_t, std::int16_t>(input);
      break;
    case 2:
      repack<std::uint16_t, std::uint16_t>(input);
      break;
    default:
      repack<std::uint16_t, std::int64_t>(input);
  }
  return 0;
}
