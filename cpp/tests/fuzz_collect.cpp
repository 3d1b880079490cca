// Any shards: refused, or collected without reading or writing elsewhere.
#include "fuzz.hpp"
#include "r3/collect.hpp"

namespace {

template <class Id, class In>
void collect(Input input) {
  std::size_t const num_layers = input.up_to(3);
  std::vector<std::int32_t> const layer_ids(num_layers, 1);
  r3::CollectJob<Id> job{.shards = {},
                         .samples = {},
                         .layer_ids = layer_ids,
                         .topk = 1 + input.up_to(16),
                         .num_experts = 1 + input.up_to(std::numeric_limits<Id>::max()),
                         .num_threads = 1 + input.up_to(2)};
  std::vector<std::vector<Id>> samples(1 + input.up_to(2));
  std::vector<std::vector<std::int32_t>> versions;
  for (auto& sample : samples) {
    versions.emplace_back(input.up_to(12));
    sample.resize(versions.back().size() * num_layers * job.topk);
    job.samples.push_back({sample.data(), versions.back()});
  }
  std::vector<std::vector<In>> ids(input.up_to(3));
  std::vector<std::vector<std::int32_t>> row_versions(ids.size());
  std::vector<std::vector<std::int64_t>> layers(ids.size());
  std::vector<std::vector<r3::Segment>> segments(ids.size());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    row_versions[i].resize(input.up_to(20));
    std::ranges::generate(row_versions[i], [&] { return static_cast<std::int32_t>(input.wild()); });
    layers[i].resize(input.up_to(3));
    std::ranges::generate(layers[i], [&] { return input.wild() % 8; });
    segments[i] = input.segments();
    ids[i] = input.numbers<In>(layers[i].size() * row_versions[i].size() * job.topk);
    job.shards.push_back({static_cast<In const*>(ids[i].data()), row_versions[i], layers[i], segments[i]});
  }
  accepted([&] { r3::collect(job); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(std::uint8_t const* data, std::size_t size) {
  Input input(data, size);
  input.up_to(1) == 0 ? collect<std::uint8_t, std::int16_t>(input) : collect<std::uint16_t, std::int64_t>(input);
  return 0;
}
