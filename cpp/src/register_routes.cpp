#include <pybind11/stl.h>

#include <optional>
#include <utility>

#include "arrays.hpp"
#include "r3/routes.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace r3 {
namespace {

using Place = std::optional<std::pair<std::size_t, std::size_t>>;

Place find_bad_route_in(py::array const& topk_ids, py::array const& version_ids, std::int64_t num_experts) {
  return with_trace_dtype(topk_ids, "topk_ids", [&]<class Id>() {
    auto ids = view<Id const, 3>(topk_ids, "topk_ids");
    auto versions = view<std::int32_t const, 1>(version_ids, "version_ids");
    auto [num_tokens, num_layers, topk] = ids.shape;
    check_length("version_ids", versions.shape[0], "topk_ids", num_tokens);
    check_experts<Id>(num_experts, topk);
    py::gil_scoped_release unlocked;
    return find_bad_route(ids.data, versions.data, num_tokens, num_layers, topk, static_cast<std::size_t>(num_experts));
  });
}

}  // namespace

void register_routes(py::module_& module) {
  module.def("find_bad_route", &find_bad_route_in, py::arg("topk_ids").noconvert(), py::arg("version_ids").noconvert(),
             py::arg("num_experts"));
}

}  // namespace r3
