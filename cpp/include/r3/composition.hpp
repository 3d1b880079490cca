// Which samples go into a micro-step together, so that in each layer its ranks get as many tokens as each other.
// S: samples; M: micro-steps; L: layers; F: loads of a micro-step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "r3/micro_steps.hpp"
#include "r3/parallel.hpp"
#include "r3/random.hpp"

namespace r3 {

// Puts the longest sample first where the sum of squared loads grows least, then lets micro-steps exchange and move
// samples, two by two, where that lowers the sum of what they cost: of each layer the fullest rank's load, of attention
// the squares of the fullest part's lengths. Rounds are as in a tournament: each micro-step meets one other, so that
// threads share out a round and change nothing.
class Composition : MicroSteps {
 public:
  explicit Composition(CompositionJob const& job) : MicroSteps(job), steps_(job.num_steps, empty_step()) {}

  // step_of, part_of: [S], written; returns M.
  std::size_t solve(std::int32_t* step_of, std::int32_t* part_of) {
    start();
    fill();
    improve();
    for (std::size_t at = 0; at < steps_.size(); ++at) {
      for (auto const& [sample, part] : steps_[at].items) {
        step_of[sample] = static_cast<std::int32_t>(at);
        part_of[sample] = static_cast<std::int32_t>(part);
      }
    }
    return steps_.size();
  }

 private:
  static constexpr std::size_t kRounds = 128;
  static constexpr double kLeast = 1e-4;  // A gain below is one of rounding.

  // What a thread works with.
  struct Room {
    std::vector<float> highest;  // [L]
    std::size_t gains = 0;
  };

  void start() {
    std::vector<std::size_t> order(job_.num_samples);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return job_.tokens[a] > job_.tokens[b]; });
    for (std::size_t sample : order) {
      std::size_t best = steps_.size();
      float least = 0;
      for (std::size_t at = 0; at < steps_.size(); ++at) {
        std::size_t const part = part_with_room(steps_[at], job_.tokens[sample]);
        if (part == job_.num_parts) {
          continue;
        }
        float const growth = growth_of(steps_[at], part, sample);
        if (best == steps_.size() || growth < least) {
          best = at;
          least = growth;
        }
      }
      if (best == steps_.size()) {
        steps_.resize(best + job_.num_groups, empty_step());
      }
      put(steps_[best], {sample, part_with_room(steps_[best], job_.tokens[sample])});
    }
  }

  // How much more a micro-step costs with a sample, in a measure that grows from the first sample on.
  float growth_of(Step const& step, std::size_t part, std::size_t sample) const {
    float const experts = dot(step.loads.data(), loads_of(sample)) * per_load_ * per_load_;
    double const squares = attention(step, part, squares_of(sample)) - attention(step);
    return experts / static_cast<float>(job_.num_ranks) + (job_.num_parts > 1 ? static_cast<float>(squares) : 0);
  }

  // Gives each empty part the shortest sample that another one can spare: no rank may be without.
  void fill() {
    for (auto& step : steps_) {
      for (std::size_t part = 0; part < job_.num_parts; ++part) {
        if (step.parts[part].count == 0) {
          spare(step, part);
        }
      }
    }
  }

  void spare(Step& to, std::size_t part) {
    Step* from = nullptr;
    std::size_t best = 0;
    for (auto& step : steps_) {
      for (std::size_t i = 0; i < step.items.size(); ++i) {
        auto const& item = step.items[i];
        bool const can = step.parts[item.part].count > 1;
        if (can && (!from || job_.tokens[item.sample] < job_.tokens[from->items[best].sample])) {
          from = &step;
          best = i;
        }
      }
    }
    if (from) {
      Item const item = from->items[best];
      float const* less = loads_of(item.sample);
      for (std::size_t i = 0; i < width_; ++i) {
        from->loads[i] -= less[i];
      }
      count(*from, item, -1);
      from->items.erase(from->items.begin() + static_cast<std::ptrdiff_t>(best));
      put(to, {item.sample, part});
    }
  }

  void improve() {
    std::vector<Room> rooms(job_.num_threads, Room{std::vector<float>(job_.num_layers), 0});
    std::size_t const even = steps_.size() + steps_.size() % 2;
    for (auto& step : steps_) {
      even_parts(step);
      step.cost = cost(step, nullptr, nullptr, rooms[0].highest) + attention(step);
    }
    if (steps_.size() < 2) {
      return;
    }
    Random random(job_.seed);
    std::vector<std::size_t> seats(even);
    std::iota(seats.begin(), seats.end(), std::size_t{0});
    for (std::size_t i = even - 1; i > 0; --i) {
      std::swap(seats[i], seats[random.below(i + 1)]);
    }
    std::size_t const per_meeting = job_.num_moves / (kRounds * even / 2) + 1;
    for (std::size_t round = 0, idle = 0; round < kRounds && idle < even; ++round) {
      in_parallel(even / 2, job_.num_threads, [&](std::size_t begin, std::size_t end, std::size_t worker) {
        for (std::size_t i = begin; i < end; ++i) {
          std::size_t const a = seats[i], b = seats[even - 1 - i];
          if (std::max(a, b) < steps_.size()) {
            meet(steps_[a], steps_[b], Random(job_.seed + round * even + i + 1), per_meeting, rooms[worker]);
          }
        }
      });
      std::size_t gains = 0;
      for (auto& room : rooms) {
        gains += std::exchange(room.gains, 0);
      }
      idle = gains > 0 ? 0 : idle + 1;
      std::rotate(seats.begin() + 1, seats.begin() + 2, seats.end());
    }
  }

  // Gives samples of one micro-step the best exchange with the other's, or moves them there; tries about so many.
  void meet(Step& a, Step& b, Random random, std::size_t num_moves, Room& room) {
    std::size_t const each = num_moves / std::max<std::size_t>(a.items.size(), 1) + 1;
    bool changed = false;
    for (std::size_t first = 0; first < a.items.size(); ++first) {
      std::size_t const places = b.items.size() + 1, begin = random.below(places);
      Change best{a.cost + b.cost - kLeast, 0, 0, {}, places};
      for (std::size_t i = 0, tried = 0; i < places && tried < each; ++i) {
        tried += try_change(a, b, first, (begin + i) % places, best, room) ? 1U : 0U;
      }
      if (best.second < places) {
        change(a, b, first, best);
        changed = true;
        ++room.gains;
      }
    }
    if (changed) {
      even_parts(a);
      even_parts(b);
      a.cost = cost(a, nullptr, nullptr, room.highest) + attention(a);
      b.cost = cost(b, nullptr, nullptr, room.highest) + attention(b);
    }
  }

  // An exchange of a's item with b's item `second`, or a move of a's to `moved.part` if that is behind b's last.
  struct Change {
    double total, cost_a, cost_b;
    Item moved;
    std::size_t second;
  };

  // Says whether the change is one that fits; keeps it if it is the best so far.
  bool try_change(Step const& a, Step const& b, std::size_t first, std::size_t second, Change& best, Room& room) const {
    Item const out = a.items[first];
    bool const exchange = second < b.items.size();
    std::int64_t const tokens = job_.tokens[out.sample];
    Item in{0, part_with_room(b, tokens)};
    if (exchange) {
      in = b.items[second];
      std::int64_t const more = tokens - job_.tokens[in.sample];
      if (!fits(b.parts[in.part], more) || !fits(a.parts[out.part], -more)) {
        return false;
      }
    } else if (in.part == job_.num_parts || a.parts[out.part].count == 1) {
      return false;
    }
    float const *mine = loads_of(out.sample), *theirs = exchange ? loads_of(in.sample) : nullptr;
    double const squares = squares_of(out.sample) - (exchange ? squares_of(in.sample) : 0);
    double const cost_a = cost(a, theirs, mine, room.highest) + attention(a, out.part, -squares);
    if (cost_a < best.total) {
      double const cost_b = cost(b, mine, theirs, room.highest) + attention(b, in.part, squares);
      if (cost_a + cost_b < best.total) {
        best = {cost_a + cost_b, cost_a, cost_b, {out.sample, in.part}, second};
      }
    }
    return true;
  }

  void change(Step& a, Step& b, std::size_t& first, Change const& best) {
    Item const out = a.items[first];
    bool const exchange = best.second < b.items.size();
    float const *mine = loads_of(out.sample), *theirs = exchange ? loads_of(b.items[best.second].sample) : nullptr;
    for (std::size_t i = 0; i < width_; ++i) {
      float const moved = mine[i] - (theirs ? theirs[i] : 0.0F);
      a.loads[i] -= moved;
      b.loads[i] += moved;
    }
    count(a, out, -1);
    count(b, best.moved, 1);
    if (exchange) {
      Item const in = b.items[best.second];
      count(b, in, -1);
      a.items[first].sample = in.sample;
      b.items[best.second].sample = out.sample;
      count(a, a.items[first], 1);
    } else {
      b.items.push_back(best.moved);
      a.items.erase(a.items.begin() + static_cast<std::ptrdiff_t>(first--));
    }
    a.cost = best.cost_a;
    b.cost = best.cost_b;
  }

  std::vector<Step> steps_;
};

}  // namespace r3
