// Tests of placement and composition by themselves, for sanitizers to watch: sizes of 1, odd ones, and samples that fit
// nowhere.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "check.hpp"
#include "r3/composition.hpp"
#include "r3/placement.hpp"
#include "r3/random.hpp"

namespace {

void test_placement(std::size_t steps, std::size_t experts, std::size_t ranks, std::size_t groups) {
  std::size_t const layers = 3;
  r3::Random random(steps * 1000 + experts);
  std::vector<std::int32_t> loads(steps * layers * experts);
  std::generate(loads.begin(), loads.end(), [&] { return static_cast<std::int32_t>(random.below(1000)); });
  r3::PlacementJob const job{loads.data(), steps, layers, experts, ranks, groups, 7, 200};
  for (std::size_t layer = 0; layer < layers; ++layer) {
    std::vector<std::int32_t> placed(experts, -1);
    r3::LayerPlacement(job, layer).solve(job.num_swaps, placed.data());
    std::size_t const group = experts / groups;
    for (std::size_t slot = 0; slot < experts; ++slot) {
      auto const first = static_cast<std::size_t>(placed[slot / group * group]);
      CHECK(static_cast<std::size_t>(placed[slot]) / group == first / group);
    }
    std::sort(placed.begin(), placed.end());
    for (std::size_t slot = 0; slot < experts; ++slot) {
      CHECK(placed[slot] == static_cast<std::int32_t>(slot));
    }
  }
}

void test_composition(std::size_t samples, std::size_t ranks, std::size_t parts, std::int64_t max_tokens) {
  std::size_t const layers = 5, groups = 2;
  r3::Random random(samples + ranks);
  std::vector<float> loads(samples * ranks * layers);
  std::generate(loads.begin(), loads.end(), [&] { return static_cast<float>(random.below(100)); });
  std::vector<std::int64_t> tokens(samples);
  std::generate(tokens.begin(), tokens.end(), [&] { return static_cast<std::int64_t>(random.below(50)); });
  std::vector<std::int32_t> found[2];
  for (std::size_t threads : {1, 3}) {
    r3::CompositionJob const job{loads.data(), tokens.data(), samples, ranks, layers, 2,      groups,
                                 parts,        max_tokens,    0.5,     3,     3000,   threads};
    std::vector<std::int32_t> step_of(samples, -1), part_of(samples, -1);
    std::size_t const steps = r3::Composition(job).solve(step_of.data(), part_of.data());
    CHECK(steps % groups == 0);
    std::vector<std::int64_t> sums(steps * parts), counts(steps * parts);
    for (std::size_t sample = 0; sample < samples; ++sample) {
      auto const step = static_cast<std::size_t>(step_of[sample]), part = static_cast<std::size_t>(part_of[sample]);
      CHECK(step < steps);
      CHECK(part < parts);
      sums[step * parts + part] += tokens[sample];
      counts[step * parts + part] += tokens[sample] > 0 ? 1 : 0;
    }
    for (std::size_t i = 0; i < steps * parts; ++i) {
      CHECK(sums[i] <= max_tokens || counts[i] == 1);
    }
    found[threads == 1 ? 0 : 1] = step_of;
  }
  CHECK(found[0] == found[1]);
}

}  // namespace

int main() {
  for (std::size_t steps : {0, 1, 5, 17}) {
    test_placement(steps, 1, 1, 1);
    test_placement(steps, 8, 8, 1);
    test_placement(steps, 12, 3, 4);
    test_placement(steps, 12, 4, 2);
    test_placement(steps, 20, 5, 2);
  }
  for (std::int64_t max_tokens : {1, 49, 120, 100000}) {
    test_composition(1, 1, 1, max_tokens);
    test_composition(2, 3, 1, max_tokens);
    test_composition(40, 4, 1, max_tokens);
    test_composition(40, 4, 3, max_tokens);
  }
  std::puts("all passed");
}
