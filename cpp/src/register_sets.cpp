#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "arrays.hpp"
#include "r3/set_routes.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace r3 {
namespace {

std::size_t as_size(std::int64_t number, char const* name) {
  if (number < 0) {
    refuse(name, " (", number, ") < 0");
  }
  return static_cast<std::size_t>(number);
}

template <class Id>
SetShape shape_of(View<Id, 3> const& ids, std::vector<std::int32_t> const& versions, std::int64_t num_experts) {
  check_length("version_ids", versions.size(), "topk_ids", ids.shape[0]);
  check_experts<std::remove_const_t<Id>>(num_experts, ids.shape[2]);
  SetShape const shape{ids.shape[0], ids.shape[1], ids.shape[2], static_cast<std::size_t>(num_experts)};
  check_set_size(shape.num_experts, shape.topk);
  return shape;
}

std::size_t num_set_bits(std::int64_t num_experts, std::int64_t topk) {
  return set_bits(as_size(num_experts, "num_experts"), as_size(topk, "topk"));
}

void encode_into(py::array const& topk_ids, py::array const& version_ids, std::int64_t num_experts,
                 py::array const& codes) {
  with_trace_dtype(topk_ids, "topk_ids", [&]<class Id>() {
    auto ids = view<Id const, 3>(topk_ids, "topk_ids");
    // Which tokens are captured decides how much is written.
    auto const versions = copy_of(view<std::int32_t const, 1>(version_ids, "version_ids"));
    auto out = view<std::uint8_t, 1>(codes, "codes");
    SetShape const shape = shape_of(ids, versions, num_experts);
    std::size_t const num_routes = count_captured(versions) * shape.num_layers;
    check_length("codes", out.shape[0], "the captured routes' codes",
                 set_bytes(num_routes, set_bits(shape.num_experts, shape.topk)));
    py::gil_scoped_release unlocked;
    encode_sets(shape, ids.data, versions, std::as_writable_bytes(out.span()));
  });
}

void decode_into(py::array const& codes, py::array const& version_ids, std::int64_t num_experts,
                 py::array const& topk_ids) {
  with_trace_dtype(topk_ids, "topk_ids", [&]<class Id>() {
    auto in = view<std::uint8_t const, 1>(codes, "codes");
    // Which tokens are captured decides how much is written.
    auto const versions = copy_of(view<std::int32_t const, 1>(version_ids, "version_ids"));
    auto ids = view<Id, 3>(topk_ids, "topk_ids");
    SetShape const shape = shape_of(ids, versions, num_experts);
    py::gil_scoped_release unlocked;
    decode_sets(shape, std::as_bytes(in.span()), versions, ids.data);
  });
}

}  // namespace

void register_sets(py::module_& module) {
  module.def("set_bits", &num_set_bits, py::arg("num_experts"), py::arg("topk"));
  module.def("encode_sets", &encode_into, py::kw_only(), py::arg("topk_ids").noconvert(),
             py::arg("version_ids").noconvert(), py::arg("num_experts"), py::arg("codes").noconvert());
  module.def("decode_sets", &decode_into, py::kw_only(), py::arg("codes").noconvert(),
             py::arg("version_ids").noconvert(), py::arg("num_experts"), py::arg("topk_ids").noconvert());
}

}  // namespace r3
