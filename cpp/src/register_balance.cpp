#include <cmath>

#include "arrays.hpp"
#include "r3/composition.hpp"
#include "r3/parallel.hpp"
#include "r3/placement.hpp"
#include "r3/rank_loads.hpp"
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

template <class T>
void check_loads(T const* data, std::size_t count, char const* name) {
  for (std::size_t i = 0; i < count; ++i) {
    if (!(data[i] >= T{0}) || !(static_cast<double>(data[i]) < 1e15)) {
      refuse(name, ": a load (", data[i], ") that is no number from 0 to 10^15");
    }
  }
}

// Copied, so that what was checked is what is used.
template <class T>
std::vector<T> checked_copy(T const* data, std::size_t count, char const* name) {
  std::vector<T> copy(data, data + count);
  check_loads(copy.data(), count, name);
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

// Copied, so that what was checked is what is used.
std::vector<std::int32_t> checked_places(View<std::int32_t const, 2> const& placed) {
  std::vector<std::int32_t> copy(placed.data, placed.data + placed.shape[0] * placed.shape[1]);
  for (std::int32_t expert : copy) {
    if (expert < 0 || static_cast<std::size_t>(expert) >= placed.shape[1]) {
      refuse("expert_at: expert ", expert, " outside 0 to ", placed.shape[1], " - 1");
    }
  }
  return copy;
}

std::size_t compose(py::array const& counts, py::array const& expert_at, py::array const& tokens,
                    py::array const& step_of, py::array const& part_of, std::int64_t num_ranks, std::int64_t num_steps,
                    std::int64_t num_groups, std::int64_t num_parts, std::int64_t max_tokens, double attention,
                    std::uint64_t seed, std::int64_t num_moves, std::int64_t num_threads) {
  auto const given = view<std::int32_t const, 3>(counts, "counts");
  auto const placed = view<std::int32_t const, 2>(expert_at, "expert_at");
  auto const lengths = view<std::int64_t const, 1>(tokens, "tokens");
  auto steps = view<std::int32_t, 1>(step_of, "step_of");
  auto parts = view<std::int32_t, 1>(part_of, "part_of");
  auto const [samples, layers, experts] = given.shape;
  check_length("expert_at", placed.shape[0], "counts dimension 1", layers);
  check_length(Name("expert_at", Name::kNoIndex, " dimension 1"), placed.shape[1], "counts dimension 2", experts);
  check_length("tokens", lengths.shape[0], "counts", samples);
  check_length("step_of", steps.shape[0], "counts", samples);
  check_length("part_of", parts.shape[0], "counts", samples);
  check_count("samples", static_cast<std::int64_t>(samples), 1);
  check_count("experts", static_cast<std::int64_t>(experts), 1);
  CompositionJob job{};
  job.num_samples = samples;
  job.num_layers = layers;
  job.num_ranks = check_divides("num_ranks", num_ranks, experts);
  job.num_steps = check_count("num_steps", num_steps, 1);
  job.num_groups = check_count("num_groups", num_groups, 1);
  job.num_parts = check_count("num_parts", num_parts, 1);
  job.max_tokens = static_cast<std::int64_t>(check_count("max_tokens", max_tokens, 1));
  job.num_moves = check_count("num_moves", num_moves, 0);
  job.num_threads = check_num_threads(num_threads);
  job.attention = attention;
  job.seed = seed;
  if (job.num_steps % job.num_groups != 0) {
    refuse("num_groups (", job.num_groups, ") does not divide num_steps (", job.num_steps, ")");
  }
  if (!(attention >= 0) || !(attention < 1e6)) {
    refuse("attention (", attention, ") outside 0 to 10^6");
  }
  py::gil_scoped_release unlocked;
  auto const places = checked_places(placed);
  auto const own = checked_copy(lengths.data, samples, "tokens");
  std::vector<float> loads(samples * job.num_ranks * layers);
  in_parallel(samples, job.num_threads, [&](std::size_t begin, std::size_t end, std::size_t) {
    rank_loads(given.data, places.data(), layers, experts, job.num_ranks, begin, end, loads.data());
  });
  check_loads(loads.data(), loads.size(), "counts");
  job.loads = loads.data();
  job.tokens = own.data();
  return Composition(job).solve(steps.data, parts.data);
}

}  // namespace

void register_balance(py::module_& module) {
  module.def("place", &place, py::kw_only(), py::arg("loads").noconvert(), py::arg("expert_at").noconvert(),
             py::arg("num_ranks"), py::arg("num_groups"), py::arg("seed"), py::arg("num_swaps"),
             py::arg("num_threads") = 1);
  module.def("compose", &compose, py::kw_only(), py::arg("counts").noconvert(), py::arg("expert_at").noconvert(),
             py::arg("tokens").noconvert(), py::arg("step_of").noconvert(), py::arg("part_of").noconvert(),
             py::arg("num_ranks"), py::arg("num_steps"), py::arg("num_groups"), py::arg("num_parts"),
             py::arg("max_tokens"), py::arg("attention"), py::arg("seed"), py::arg("num_moves"),
             py::arg("num_threads") = 1);
}

}  // namespace r3
