#include <cmath>

#include "arrays.hpp"
#include "r3/composition.hpp"
#include "r3/parallel.hpp"
#include "r3/placement.hpp"
#include "register.hpp"

namespace py = pybind11;

namespace r3 {
namespace {

std::size_t check_count(char const* name, std::int64_t value, std::int64_t least) {
  constexpr std::int64_t kMost = std::int64_t{1} << 31;
  if (value < least || value > kMost) {
    refuse(name, " (", value, ") outside ", least, " to ", kMost);
  }
  return static_cast<std::size_t>(value);
}

std::size_t check_divides(char const* name, std::int64_t value, std::size_t num_experts) {
  std::size_t const count = check_count(name, value, 1);
  if (num_experts % count != 0) {
    refuse(name, " (", value, ") does not divide the ", num_experts, " experts");
  }
  return count;
}

// Copied, so that what was checked is what is used.
template <class T>
std::vector<T> checked_copy(T const* data, std::size_t count, char const* name) {
  std::vector<T> copy(data, data + count);
  for (T value : copy) {
    if (!(value >= T{0}) || !(static_cast<double>(value) < 1e15)) {
      refuse(name, ": a load (", value, ") that is no number from 0 to 10^15");
    }
  }
  return copy;
}

void place(py::array const& loads, py::array const& expert_at, std::int64_t num_ranks, std::int64_t num_groups,
           std::uint64_t seed, std::int64_t num_swaps, std::int64_t num_threads) {
  auto const given = view<std::int32_t const, 3>(loads, "loads");
  auto out = view<std::int32_t, 2>(expert_at, "expert_at");
  check_length("expert_at", out.shape[0], "loads dimension 1", given.shape[1]);
  check_length(Name("expert_at", Name::kNoIndex, " dimension 1"), out.shape[1], "loads dimension 2", given.shape[2]);
  PlacementJob job{nullptr, given.shape[0], given.shape[1], given.shape[2], 0, 0, seed, 0};
  check_count("experts", static_cast<std::int64_t>(job.num_experts), 1);
  job.num_ranks = check_divides("num_ranks", num_ranks, job.num_experts);
  job.num_groups = check_divides("num_groups", num_groups, job.num_experts);
  job.num_swaps = check_count("num_swaps", num_swaps, 0);
  std::size_t const threads = check_num_threads(num_threads);
  py::gil_scoped_release unlocked;
  auto const copy = checked_copy(given.data, job.num_steps * job.num_layers * job.num_experts, "loads");
  job.loads = copy.data();
  in_parallel(job.num_layers, threads, [&](std::size_t begin, std::size_t end, std::size_t) {
    for (std::size_t layer = begin; layer < end; ++layer) {
      LayerPlacement(job, layer).solve(job.num_swaps, out.data + layer * job.num_experts);
    }
  });
}

std::size_t compose(py::array const& loads, py::array const& tokens, py::array const& step_of, std::int64_t num_steps,
                    std::int64_t max_tokens, std::uint64_t seed, std::int64_t num_moves) {
  auto const given = view<float const, 3>(loads, "loads");
  auto const lengths = view<std::int64_t const, 1>(tokens, "tokens");
  auto out = view<std::int32_t, 1>(step_of, "step_of");
  check_length("tokens", lengths.shape[0], "loads", given.shape[0]);
  check_length("step_of", out.shape[0], "loads", given.shape[0]);
  check_count("samples", static_cast<std::int64_t>(given.shape[0]), 1);
  CompositionJob job{nullptr, nullptr, given.shape[0], given.shape[1], given.shape[2], 0, 0, seed, 0};
  job.num_steps = check_count("num_steps", num_steps, 1);
  job.max_tokens = static_cast<std::int64_t>(check_count("max_tokens", max_tokens, 1));
  job.num_moves = check_count("num_moves", num_moves, 0);
  py::gil_scoped_release unlocked;
  auto const copy = checked_copy(given.data, job.num_samples * job.num_ranks * job.num_layers, "loads");
  auto const counts = checked_copy(lengths.data, job.num_samples, "tokens");
  job.loads = copy.data();
  job.tokens = counts.data();
  return Composition(job).solve(out.data);
}

}  // namespace

void register_balance(py::module_& module) {
  module.def("place", &place, py::kw_only(), py::arg("loads").noconvert(), py::arg("expert_at").noconvert(),
             py::arg("num_ranks"), py::arg("num_groups"), py::arg("seed"), py::arg("num_swaps"),
             py::arg("num_threads") = 1);
  module.def("compose", &compose, py::kw_only(), py::arg("loads").noconvert(), py::arg("tokens").noconvert(),
             py::arg("step_of").noconvert(), py::arg("num_steps"), py::arg("max_tokens"), py::arg("seed"),
             py::arg("num_moves"));
}

}  // namespace r3
