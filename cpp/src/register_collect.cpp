#include <pybind11/stl.h>

#include <deque>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "r3/collect.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace r3 {
namespace {

// What Python hands over, still unchecked: four lists with an item a shard, two with an item a sample.
struct Request {
  py::list ids;
  py::list row_versions;
  py::list segments;
  py::list layer_indices;
  py::list topk_ids;
  py::list version_ids;
  py::array layer_ids;
  std::int64_t num_experts;
  std::int64_t num_threads;
};

// Keeps arrays alive while the lists that they came from may change, and what must not change.
struct Owners {
  std::vector<py::array> arrays;
  std::deque<std::vector<std::int32_t>> versions;
  std::deque<std::vector<std::int64_t>> layers;
  std::deque<std::vector<Segment>> segments;
};

template <class Id>
void add_shard(CollectJob<Id>& job, Owners& owners, Request const& request, std::size_t i) {
  Name const name("ids", i);
  auto versions = view<std::int32_t const, 1>(request.row_versions[i], Name("row_versions", i));
  auto layers = view<std::int64_t const, 1>(request.layer_indices[i], Name("layer_indices", i));
  auto segments = view_segments(request.segments[i], Name("segments", i));
  if (!py::isinstance<py::array>(request.ids[i])) {
    refuse(name, " is not a numpy array");
  }
  AnyIds const ids = with_local_dtype(request.ids[i].cast<py::array>(), name, [&]<class In>() -> AnyIds {
    auto array = view<In const, 3>(request.ids[i], name);
    check_length(name, array.shape[0], "layer_indices", layers.shape[0]);
    check_length(Name(name.array, i, " dimension 1"), array.shape[1], "row_versions", versions.shape[0]);
    check_length(Name(name.array, i, " dimension 2"), array.shape[2], "topk_ids[0]", job.topk);
    owners.arrays.push_back(array.owner);
    return array.data;
  });
  job.shards.push_back({ids, owners.versions.emplace_back(copy_of(versions)),
                        owners.layers.emplace_back(copy_of(layers)), owners.segments.emplace_back(copy_of(segments))});
}

template <class Id>
void add_sample(CollectJob<Id>& job, Owners& owners, Request const& request, std::size_t i) {
  Name const name("topk_ids", i);
  auto ids = view<Id, 3>(request.topk_ids[i], name);
  auto versions = view<std::int32_t, 1>(request.version_ids[i], Name("version_ids", i));
  if (i == 0) {
    job.topk = ids.shape[2];
    check_experts<Id>(request.num_experts, job.topk);
  }
  check_length(name, ids.shape[0], "version_ids", versions.shape[0]);
  check_length(Name(name.array, i, " dimension 1"), ids.shape[1], "layer_ids", job.layer_ids.size());
  check_length(Name(name.array, i, " dimension 2"), ids.shape[2], "topk_ids[0]", job.topk);
  job.samples.push_back({ids.data, versions.span()});
  owners.arrays.insert(owners.arrays.end(), {ids.owner, versions.owner});
}

template <class Id>
void collect_typed(Request const& request) {
  auto layer_ids = view<std::int32_t const, 1>(request.layer_ids, "layer_ids");
  CollectJob<Id> job{.shards = {},
                     .samples = {},
                     .layer_ids = layer_ids.span(),
                     .topk = 0,
                     .num_experts = static_cast<std::size_t>(request.num_experts),
                     .num_threads = check_num_threads(request.num_threads)};
  Owners owners;
  for (std::size_t i = 0; i < request.topk_ids.size(); ++i) {
    add_sample(job, owners, request, i);
  }
  for (std::size_t i = 0; i < request.ids.size(); ++i) {
    add_shard(job, owners, request, i);
  }
  py::gil_scoped_release unlocked;
  collect(job);
}

void collect_into(py::list ids, py::list row_versions, py::list segments, py::list layer_indices, py::list topk_ids,
                  py::list version_ids, py::array layer_ids, std::int64_t num_experts, std::int64_t num_threads) {
  check_length("row_versions", row_versions.size(), "ids", ids.size());
  check_length("segments", segments.size(), "ids", ids.size());
  check_length("layer_indices", layer_indices.size(), "ids", ids.size());
  check_length("version_ids", version_ids.size(), "topk_ids", topk_ids.size());
  if (topk_ids.empty() || !py::isinstance<py::array>(topk_ids[0])) {
    refuse("topk_ids: no samples, or the first one is not a numpy array");
  }
  Request const request{ids,         row_versions, segments,    layer_indices, topk_ids,
                        version_ids, layer_ids,    num_experts, num_threads};
  with_trace_dtype(topk_ids[0].cast<py::array>(), "topk_ids[0]", [&]<class Id>() { collect_typed<Id>(request); });
}

}  // namespace

void register_collect(py::module_& module) {
  module.def("collect", &collect_into, py::kw_only(), py::arg("ids").noconvert(), py::arg("row_versions").noconvert(),
             py::arg("segments").noconvert(), py::arg("layer_indices").noconvert(), py::arg("topk_ids").noconvert(),
             py::arg("version_ids").noconvert(), py::arg("layer_ids").noconvert(), py::arg("num_experts"),
             py::arg("num_threads") = 1);
}

}  // namespace r3
