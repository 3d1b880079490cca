#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "arrays.hpp"
#include "r3/counts.hpp"
#include "r3/repack.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace r3 {
namespace {

// The arguments from Python, not checked yet.
struct Request {
  py::list topk_ids;
  py::list version_ids;
  py::array segments;
  py::array layer_indices;
  py::array out;
  py::array row_versions;
  std::int64_t num_experts;
  std::int64_t ep_size;
  std::optional<py::array> counts;
  std::optional<py::list> token_ids;
  std::optional<py::array> expected_ids;
  std::optional<py::list> version_maps;
  std::int64_t num_threads;
  std::size_t stream_from;
  bool balance_last;
  std::optional<py::array> slot_of;
};

// A view keeps its array alive while the list that it came from may change.
template <class Id>
struct Inputs {
  std::vector<View<Id const, 3>> ids;
  std::vector<View<std::int32_t const, 1>> vectors;
};

template <class Id, class Out>
void add_trace(RepackJob<Id, Out>& job, Inputs<Id>& inputs, Request const& request, std::size_t i) {
  Name const name("topk_ids", i);
  auto ids = view<Id const, 3>(request.topk_ids[i], name);
  auto versions = view<std::int32_t const, 1>(request.version_ids[i], Name("version_ids", i));
  check_length(Name("version_ids", i), versions.shape[0], name, ids.shape[0]);
  if (i == 0) {
    job.num_layers = ids.shape[1];
  }
  check_length(Name(name.array, i, " dimension 1"), ids.shape[1], "topk_ids[0]", job.num_layers);
  check_length(Name(name.array, i, " dimension 2"), ids.shape[2], "out", job.topk);
  Trace<Id> trace{ids.data, versions.data, nullptr, ids.shape[0], {}};
  trace.pad_last = request.balance_last && trace.num_tokens > 0 && versions.data[trace.num_tokens - 1] < 0;
  if (request.token_ids) {
    auto tokens = view<std::int32_t const, 1>((*request.token_ids)[i], Name("token_ids", i));
    check_length(Name("token_ids", i), tokens.shape[0], name, ids.shape[0]);
    trace.token_ids = tokens.data;
    inputs.vectors.push_back(tokens);
  }
  if (request.version_maps && !py::object((*request.version_maps)[i]).is_none()) {
    auto map = view<std::int32_t const, 1>((*request.version_maps)[i], Name("version_maps", i));
    trace.version_map = map.span();
    inputs.vectors.push_back(map);
  }
  job.traces.push_back(trace);
  inputs.ids.push_back(ids);
  inputs.vectors.push_back(versions);
}

template <class Id, class Out>
void repack_typed(Request const& request) {
  auto out = view<Out, 3>(request.out, "out");
  auto const layers = copy_of(view<std::int64_t const, 1>(request.layer_indices, "layer_indices"));
  auto versions = view<std::int32_t, 1>(request.row_versions, "row_versions");
  auto const segments = copy_of(view_segments(request.segments, "segments"));
  check_length("out", out.shape[0], "layer_indices", layers.size());
  check_length("row_versions", versions.shape[0], "out", out.shape[1]);
  check_experts<Id>(request.num_experts, out.shape[2]);
  if (request.ep_size < 1) {
    refuse("ep_size (", request.ep_size, ") < 1");
  }
  RepackJob<Id, Out> job{.traces = {},
                         .segments = segments,
                         .layer_indices = layers,
                         .num_layers = 0,
                         .topk = out.shape[2],
                         .num_experts = static_cast<std::size_t>(request.num_experts),
                         .ep_size = static_cast<std::size_t>(request.ep_size),
                         .num_rows = out.shape[1],
                         .num_threads = check_num_threads(request.num_threads),
                         .out = out.data,
                         .row_versions = versions.data,
                         .counts = nullptr,
                         .expected_tokens = nullptr,
                         .stream_from = request.stream_from};
  if (request.slot_of) {
    auto slot_of = view<std::int32_t const, 2>(*request.slot_of, "slot_of");
    check_length("slot_of", slot_of.shape[0], "layer_indices", layers.size());
    check_length("slot_of dimension 1", slot_of.shape[1], "num_experts", job.num_experts);
    job.slots = SlotTables<Id>({slot_of.data, layers.size() * job.num_experts}, job.num_experts);
  }
  if (request.counts) {
    auto counts = view<std::int64_t, 2>(*request.counts, "counts");
    check_length("counts", counts.shape[0], "layer_indices", layers.size());
    check_length("counts dimension 1", counts.shape[1], "num_experts", job.num_experts);
    job.counts = counts.data;
  }
  if (request.expected_ids) {
    auto expected = view<std::int64_t const, 1>(*request.expected_ids, "expected_ids");
    check_length("expected_ids", expected.shape[0], "out", job.num_rows);
    job.expected_tokens = expected.data;
  }
  Inputs<Id> inputs;
  for (std::size_t i = 0; i < request.topk_ids.size(); ++i) {
    add_trace(job, inputs, request, i);
  }
  py::gil_scoped_release unlocked;
  repack(job);
}

void repack_into(py::list topk_ids, py::list version_ids, py::array segments, py::array layer_indices, py::array out,
                 py::array row_versions, std::int64_t num_experts, std::int64_t ep_size,
                 std::optional<py::array> counts, std::optional<py::list> token_ids,
                 std::optional<py::array> expected_ids, std::optional<py::list> version_maps, std::int64_t num_threads,
                 std::size_t stream_from, bool balance_last, std::optional<py::array> slot_of) {
  if (topk_ids.empty()) {
    refuse("topk_ids: no traces");
  }
  check_length("version_ids", version_ids.size(), "topk_ids", topk_ids.size());
  if (token_ids.has_value() != expected_ids.has_value()) {
    refuse("token_ids and expected_ids are compared: give both or neither");
  }
  if (token_ids) {
    check_length("token_ids", token_ids->size(), "topk_ids", topk_ids.size());
  }
  if (version_maps) {
    check_length("version_maps", version_maps->size(), "topk_ids", topk_ids.size());
  }
  if (!py::isinstance<py::array>(topk_ids[0])) {
    refuse("topk_ids[0] is not a numpy array");
  }
  Request const request{topk_ids,    version_ids, segments,     layer_indices, out,          row_versions,
                        num_experts, ep_size,     counts,       token_ids,     expected_ids, version_maps,
                        num_threads, stream_from, balance_last, slot_of};
  with_trace_dtype(topk_ids[0].cast<py::array>(), "topk_ids[0]", [&]<class Id>() {
    with_local_dtype(out, "out", [&]<class Out>() { repack_typed<Id, Out>(request); });
  });
}

void count_into(py::array topk_ids, py::array row_versions, py::array counts) {
  with_local_dtype(topk_ids, "topk_ids", [&]<class Id>() {
    auto ids = view<Id const, 3>(topk_ids, "topk_ids");
    auto versions = view<std::int32_t const, 1>(row_versions, "row_versions");
    auto result = view<std::int64_t, 2>(counts, "counts");
    check_length("row_versions", versions.shape[0], "topk_ids", ids.shape[1]);
    check_length("counts", result.shape[0], "topk_ids", ids.shape[0]);
    py::gil_scoped_release unlocked;
    count_experts(ids.data, versions.span(), ids.shape[2], result.shape[0], result.shape[1], result.data);
  });
}

}  // namespace

void register_repack(py::module_& module) {
  module.def("count_experts", &count_into, py::kw_only(), py::arg("topk_ids").noconvert(),
             py::arg("row_versions").noconvert(), py::arg("counts").noconvert());
  module.def("repack", &repack_into, py::kw_only(), py::arg("topk_ids").noconvert(), py::arg("version_ids").noconvert(),
             py::arg("segments").noconvert(), py::arg("layer_indices").noconvert(), py::arg("out").noconvert(),
             py::arg("row_versions").noconvert(), py::arg("num_experts"), py::arg("ep_size"),
             py::arg("counts").noconvert() = py::none(), py::arg("token_ids").noconvert() = py::none(),
             py::arg("expected_ids").noconvert() = py::none(), py::arg("version_maps").noconvert() = py::none(),
             py::arg("num_threads") = 1, py::arg("stream_from") = std::size_t{1} << 22, py::arg("balance_last") = false,
             py::arg("slot_of").noconvert() = py::none());
}

}  // namespace r3
