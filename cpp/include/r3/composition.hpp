// Which samples go into a micro-step together, so that in each layer its ranks get as many tokens as each other.
// S: samples; M: micro-steps; R: ranks; L: layers; F: R * L, in which layers lie next to each other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "r3/random.hpp"

namespace r3 {

struct CompositionJob {
  float const* loads;          // [S, R, L] tokens that a sample sends to each rank
  std::int64_t const* tokens;  // [S]
  std::size_t num_samples;
  std::size_t num_ranks;
  std::size_t num_layers;
  std::size_t num_steps;    // at least; more where samples do not fit
  std::int64_t max_tokens;  // of a micro-step; a longer sample has one for itself
  std::uint64_t seed;
  std::size_t num_moves;  // tried
};

// Puts the longest sample first where the sum of squared loads grows least, then exchanges and moves samples where that
// lowers the sum over layers of the fullest rank's load.
class Composition {
 public:
  explicit Composition(CompositionJob const& job)
      : job_(job), width_(job.num_ranks * job.num_layers), random_(job.seed), step_of_(job.num_samples) {
    loads_.resize(job.num_steps * width_);
    tokens_.resize(job.num_steps);
  }

  // step_of: [S], written; returns M.
  std::size_t solve(std::int32_t* step_of) {
    start();
    improve();
    for (std::size_t sample = 0; sample < job_.num_samples; ++sample) {
      step_of[sample] = static_cast<std::int32_t>(step_of_[sample]);
    }
    return tokens_.size();
  }

 private:
  static constexpr std::size_t kLanes = 8;

  float const* sample(std::size_t number) const { return job_.loads + number * width_; }
  float* step(std::size_t number) { return loads_.data() + number * width_; }

  void start() {
    std::vector<std::size_t> order(job_.num_samples);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return job_.tokens[a] > job_.tokens[b]; });
    for (std::size_t each : order) {
      std::size_t best = tokens_.size();
      float least = 0;
      for (std::size_t at = 0; at < tokens_.size(); ++at) {
        if (tokens_[at] > 0 && tokens_[at] + job_.tokens[each] > job_.max_tokens) {
          continue;
        }
        float const growth = dot(step(at), sample(each));
        if (best == tokens_.size() || growth < least) {
          best = at;
          least = growth;
        }
      }
      if (best == tokens_.size()) {
        tokens_.push_back(0);
        loads_.resize(loads_.size() + width_);
      }
      add(best, each, 1);
    }
  }

  void improve() {
    std::size_t const steps = tokens_.size();
    if (steps < 2 || job_.num_samples < 2) {
      return;
    }
    costs_.resize(steps);
    for (std::size_t at = 0; at < steps; ++at) {
      costs_[at] = cost(step(at), nullptr, nullptr, 0);
    }
    for (std::size_t move = 0; move < job_.num_moves; ++move) {
      std::size_t const first = random_.below(job_.num_samples);
      if (move % 2 == 0) {
        std::size_t const second = random_.below(job_.num_samples);
        try_change(first, &second, step_of_[second]);
      } else {
        try_change(first, nullptr, random_.below(steps));
      }
    }
  }

  // Moves a sample to another micro-step, in exchange for one of there if it is given, where that lowers the cost.
  void try_change(std::size_t first, std::size_t const* second, std::size_t to) {
    std::size_t const from = step_of_[first];
    std::int64_t const moved = job_.tokens[first] - (second ? job_.tokens[*second] : 0);
    if (from == to || !fits(to, moved) || !fits(from, -moved)) {
      return;
    }
    float const* in = second ? sample(*second) : nullptr;
    double const here = cost(step(from), in, sample(first), 1), there = cost(step(to), in, sample(first), -1);
    if (here + there >= costs_[from] + costs_[to]) {
      return;
    }
    add(from, first, -1);
    add(to, first, 1);
    if (second) {
      add(to, *second, -1);
      add(from, *second, 1);
    }
    costs_[from] = here;
    costs_[to] = there;
  }

  bool fits(std::size_t at, std::int64_t more) const { return more <= 0 || tokens_[at] + more <= job_.max_tokens; }

  // The sum over layers of the fullest rank's load, with sign * (in - out) added; either may be missing.
  double cost(float const* load, float const* in, float const* out, float sign) {
    highest_.assign(job_.num_layers, 0);
    for (std::size_t rank = 0; rank < job_.num_ranks; ++rank) {
      std::size_t const at = rank * job_.num_layers;
      for (std::size_t layer = 0; layer < job_.num_layers; ++layer) {
        float change = in ? in[at + layer] : 0.0F;
        change -= out ? out[at + layer] : 0.0F;
        highest_[layer] = std::max(highest_[layer], load[at + layer] + sign * change);
      }
    }
    return std::accumulate(highest_.begin(), highest_.end(), 0.0);
  }

  void add(std::size_t at, std::size_t each, int sign) {
    float* load = step(at);
    float const* more = sample(each);
    float const factor = static_cast<float>(sign);
    for (std::size_t i = 0; i < width_; ++i) {
      load[i] += factor * more[i];
    }
    tokens_[at] += sign * job_.tokens[each];
    if (sign > 0) {
      step_of_[each] = at;
    }
  }

  // In lanes, since the order of a sum of floats is not the compiler's to change.
  float dot(float const* left, float const* right) const {
    float lanes[kLanes] = {};
    std::size_t i = 0;
    for (; i + kLanes <= width_; i += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += left[i + lane] * right[i + lane];
      }
    }
    for (; i < width_; ++i) {
      lanes[0] += left[i] * right[i];
    }
    return std::accumulate(lanes, lanes + kLanes, 0.0F);
  }

  CompositionJob job_;
  std::size_t width_;
  Random random_;
  std::vector<std::size_t> step_of_;  // by sample
  std::vector<float> loads_;          // [M, F]
  std::vector<std::int64_t> tokens_;  // by micro-step
  std::vector<double> costs_;         // by micro-step
  std::vector<float> highest_;        // by layer
};

}  // namespace r3
