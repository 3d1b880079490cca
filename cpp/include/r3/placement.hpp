// On which rank each expert of a layer lies, so that in each micro-step the ranks get as many tokens as each other.
// B: micro-steps; L: layers; E: experts; R: ranks; G: groups of a router that is limited to some of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <numeric>
#include <span>
#include <vector>

#include "r3/random.hpp"

namespace r3 {

struct PlacementJob {
  std::int32_t const* loads;  // [B, L, E] tokens
  std::size_t num_steps;
  std::size_t num_layers;
  std::size_t num_experts;
  std::size_t num_ranks;   // divides E
  std::size_t num_groups;  // divides E
  std::uint64_t seed;
  std::size_t num_swaps;  // tried in each layer
};

// Places the experts of one layer: the largest first, each on the emptiest rank that has a slot left; then swaps that
// lower the sum over micro-steps of the fullest rank's load. A group's experts stay in one block of E / G slots, since
// the router knows groups by their place: where a rank holds whole blocks, whole groups are placed, else the experts
// of each group within its block.
class LayerPlacement {
 public:
  LayerPlacement(PlacementJob const& job, std::size_t layer)
      : steps_(job.num_steps), ranks_(job.num_ranks), random_(job.seed * 0x10001 + layer) {
    std::size_t const group = job.num_experts / job.num_groups, slots = job.num_experts / job.num_ranks;
    size_ = job.num_groups > 1 && slots % group == 0 ? group : 1;
    block_ = size_ > 1 || job.num_groups == 1 ? job.num_experts / size_ : group;
    items_.assign(job.num_experts / size_ * steps_, 0);
    for (std::size_t step = 0; step < steps_; ++step) {
      std::int32_t const* row = job.loads + (step * job.num_layers + layer) * job.num_experts;
      for (std::size_t expert = 0; expert < job.num_experts; ++expert) {
        items_[expert / size_ * steps_ + step] += static_cast<float>(row[expert]);
      }
    }
    item_at_.resize(job.num_experts / size_);
    per_rank_ = item_at_.size() / ranks_;
  }

  // expert_at: [E], written; the expert that each slot gets. It is never worse than the experts as they are.
  void solve(std::size_t num_swaps, std::int32_t* expert_at) {
    std::iota(item_at_.begin(), item_at_.end(), std::size_t{0});
    sum_loads();
    double const as_is = cost();
    start();
    if (cost() > as_is) {
      std::iota(item_at_.begin(), item_at_.end(), std::size_t{0});
      sum_loads();
    }
    improve(num_swaps);
    for (std::size_t place = 0; place < item_at_.size(); ++place) {
      for (std::size_t i = 0; i < size_; ++i) {
        expert_at[place * size_ + i] = static_cast<std::int32_t>(item_at_[place] * size_ + i);
      }
    }
  }

 private:
  static constexpr std::size_t kLanes = 8;

  std::span<float const> item(std::size_t number) const { return {items_.data() + number * steps_, steps_}; }
  std::size_t rank_of(std::size_t place) const { return place / per_rank_; }

  void sum_loads() {
    loads_.assign(ranks_ * steps_, 0);
    for (std::size_t place = 0; place < item_at_.size(); ++place) {
      auto load = std::span(loads_).subspan(rank_of(place) * steps_, steps_);
      std::transform(load.begin(), load.end(), item(item_at_[place]).begin(), load.begin(), std::plus<>());
    }
  }

  // The sum over micro-steps of the fullest rank's load.
  double cost() const {
    double sum = 0;
    for (std::size_t step = 0; step < steps_; ++step) {
      float highest = 0;
      for (std::size_t rank = 0; rank < ranks_; ++rank) {
        highest = std::max(highest, loads_[rank * steps_ + step]);
      }
      sum += highest;
    }
    return sum;
  }

  void start() {
    std::vector<double> totals(item_at_.size()), ranks(ranks_, 0);
    for (std::size_t each = 0; each < totals.size(); ++each) {
      totals[each] = std::accumulate(item(each).begin(), item(each).end(), 0.0);
    }
    std::vector<std::size_t> order(block_);
    for (std::size_t first = 0; first < item_at_.size(); first += block_) {
      std::iota(order.begin(), order.end(), first);
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return totals[a] > totals[b]; });
      std::vector<bool> taken(block_);
      for (std::size_t each : order) {
        std::size_t best = block_;
        for (std::size_t place = 0; place < block_; ++place) {
          if (!taken[place] && (best == block_ || ranks[rank_of(first + place)] < ranks[rank_of(first + best)])) {
            best = place;
          }
        }
        taken[best] = true;
        item_at_[first + best] = each;
        ranks[rank_of(first + best)] += totals[each];
      }
    }
    sum_loads();
  }

  // Two ranks at a time, in an order of chance: whatever they exchange, the fullest of the others stays what it is.
  void improve(std::size_t num_swaps) {
    std::vector<std::size_t> pairs;
    for (std::size_t a = 0; a < ranks_; ++a) {
      for (std::size_t b = a + 1; b < ranks_; ++b) {
        pairs.push_back(a * ranks_ + b);
      }
    }
    others_.resize(steps_);
    std::size_t tried = 0;
    for (bool better = true; better && tried < num_swaps;) {
      better = false;
      for (std::size_t left = pairs.size(); left > 0 && tried < num_swaps; --left) {
        std::swap(pairs[left - 1], pairs[random_.below(left)]);
        tried += per_rank_ * per_rank_;
        better |= exchange_best(pairs[left - 1] / ranks_, pairs[left - 1] % ranks_);
      }
    }
  }

  // Gives each item of a rank the best exchange with another rank's; says whether there was one.
  bool exchange_best(std::size_t a, std::size_t b) {
    std::fill(others_.begin(), others_.end(), 0.0F);
    for (std::size_t rank = 0; rank < ranks_; ++rank) {
      float const* load = loads_.data() + rank * steps_;
      for (std::size_t step = 0; rank != a && rank != b && step < steps_; ++step) {
        others_[step] = std::max(others_[step], load[step]);
      }
    }
    bool found = false;
    for (std::size_t first = a * per_rank_; first < (a + 1) * per_rank_; ++first) {
      std::size_t best = first;
      float most = 0.5F;
      for (std::size_t second = b * per_rank_; second < (b + 1) * per_rank_; ++second) {
        if (first / block_ != second / block_) {
          continue;
        }
        if (float const found_gain = gain(first, second); found_gain > most) {
          best = second;
          most = found_gain;
        }
      }
      if (best != first) {
        exchange(first, best);
        found = true;
      }
    }
    return found;
  }

  // How much lower the sum of the fullest ranks' loads becomes. In lanes, since the order of a sum of floats is not the
  // compiler's to change.
  float gain(std::size_t first, std::size_t second) const {
    float const* mine = loads_.data() + rank_of(first) * steps_;
    float const* theirs = loads_.data() + rank_of(second) * steps_;
    float const* out = items_.data() + item_at_[first] * steps_;
    float const* in = items_.data() + item_at_[second] * steps_;
    float const* others = others_.data();
    float lanes[kLanes] = {};
    auto const lower = [&](std::size_t step) {
      float const moved = in[step] - out[step];
      float const before = std::max(others[step], std::max(mine[step], theirs[step]));
      return before - std::max(others[step], std::max(mine[step] + moved, theirs[step] - moved));
    };
    std::size_t step = 0;
    for (; step + kLanes <= steps_; step += kLanes) {
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        lanes[lane] += lower(step + lane);
      }
    }
    for (; step < steps_; ++step) {
      lanes[0] += lower(step);
    }
    return std::accumulate(lanes, lanes + kLanes, 0.0F);
  }

  void exchange(std::size_t first, std::size_t second) {
    float* mine = loads_.data() + rank_of(first) * steps_;
    float* theirs = loads_.data() + rank_of(second) * steps_;
    auto const out = item(item_at_[first]), in = item(item_at_[second]);
    for (std::size_t step = 0; step < steps_; ++step) {
      mine[step] += in[step] - out[step];
      theirs[step] += out[step] - in[step];
    }
    std::swap(item_at_[first], item_at_[second]);
  }

  std::size_t steps_, ranks_;
  Random random_;
  std::size_t size_;                  // experts of an item: 1, or those of a group
  std::size_t block_;                 // places that an item may take, beginning at a multiple of this
  std::size_t per_rank_;              // places of a rank
  std::vector<float> items_;          // [items, B]
  std::vector<float> loads_;          // [R, B]
  std::vector<float> others_;         // [B] the fullest of the ranks that exchange nothing
  std::vector<std::size_t> item_at_;  // by place
};

}  // namespace r3
