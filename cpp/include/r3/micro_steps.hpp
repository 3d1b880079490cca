// A micro-step of an expert group: the samples in it, the parts that its data-parallel ranks have, and what it costs.
// S: samples; P: parts of a micro-step; R: ranks that share experts out; L: layers; F: R * L, in which layers lie next
// to each other.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

namespace r3 {

struct CompositionJob {
  float const* loads;          // [S, R, L] tokens that a sample sends to each rank
  std::int64_t const* tokens;  // [S]
  std::size_t num_samples;
  std::size_t num_ranks;
  std::size_t num_layers;
  std::size_t num_steps;    // at least; more where samples do not fit
  std::size_t num_groups;   // divides num_steps; expert groups that have as many micro-steps as each other
  std::size_t num_parts;    // P
  std::int64_t max_tokens;  // of a part; a longer sample has one for itself
  double attention;         // attention's quadratic time over that of the experts, both as even as they can be
  std::uint64_t seed;
  std::size_t num_moves;  // tried, about
  std::size_t num_threads;
};

// How micro-steps are filled and what they cost.
class MicroSteps {
 protected:
  static constexpr std::size_t kLanes = 8;
  static constexpr float kSteep = 0.03F;

  struct Item {
    std::size_t sample, part;
  };
  struct Part {
    std::int64_t tokens = 0;
    double squares = 0;
    std::size_t count = 0;
  };
  struct Step {
    std::vector<float> loads;  // [F]
    std::vector<Item> items;
    std::vector<Part> parts;
    double cost = 0;
  };

  // Loads and squares are counted in what each rank, or part, would have if all were even.
  explicit MicroSteps(CompositionJob const& job) : job_(job), width_(job.num_ranks * job.num_layers) {
    double loads = 0, squares = 0;
    for (std::size_t sample = 0; sample < job_.num_samples; ++sample) {
      loads = std::accumulate(loads_of(sample), loads_of(sample) + width_, loads);
      squares += squares_of(sample);
    }
    auto const steps = static_cast<double>(job_.num_steps);
    per_load_ = loads > 0 ? static_cast<float>(static_cast<double>(width_) * steps / loads) : 1.0F;
    per_square_ = squares > 0 ? steps * static_cast<double>(job_.num_parts) / squares : 1.0;
  }

  Step empty_step() const { return {std::vector<float>(width_), {}, std::vector<Part>(job_.num_parts), 0}; }
  float const* loads_of(std::size_t sample) const { return job_.loads + sample * width_; }
  double squares_of(std::size_t sample) const {
    auto const tokens = static_cast<double>(job_.tokens[sample]);
    return tokens * tokens;
  }

  // Of the parts that a sample fits into, the one with the fewest squares; P if there is none.
  std::size_t part_with_room(Step const& step, std::int64_t tokens) const {
    std::size_t best = job_.num_parts;
    for (std::size_t part = 0; part < job_.num_parts; ++part) {
      Part const& found = step.parts[part];
      bool const fits = found.count == 0 || found.tokens + tokens <= job_.max_tokens;
      if (fits && (best == job_.num_parts || found.squares < step.parts[best].squares)) {
        best = part;
      }
    }
    return best;
  }

  void put(Step& step, Item const& item) {
    float const* more = loads_of(item.sample);
    for (std::size_t i = 0; i < width_; ++i) {
      step.loads[i] += more[i];
    }
    step.items.push_back(item);
    count(step, item, 1);
  }

  void count(Step& step, Item const& item, int sign) const {
    Part& part = step.parts[item.part];
    part.tokens += sign * job_.tokens[item.sample];
    part.squares += sign * squares_of(item.sample);
    sign > 0 ? ++part.count : --part.count;
  }

  bool fits(Part const& part, std::int64_t more) const { return more <= 0 || part.tokens + more <= job_.max_tokens; }

  // Exchanges and moves samples between parts while that leaves the fullest of them fewer squares.
  void even_parts(Step& step) const {
    while (even_fullest(step)) {
    }
  }

  bool even_fullest(Step& step) const {
    auto const fewer = [](Part const& left, Part const& right) { return left.squares < right.squares; };
    auto const at = std::max_element(step.parts.begin(), step.parts.end(), fewer) - step.parts.begin();
    auto const fullest = static_cast<std::size_t>(at);
    for (std::size_t first = 0; first < step.items.size(); ++first) {
      for (std::size_t part = 0; step.items[first].part == fullest && part < job_.num_parts; ++part) {
        if (part != fullest && ease(step, first, part)) {
          return true;
        }
      }
    }
    return false;
  }

  // Moves a sample to another part, in exchange for one or none of its, if both then have fewer squares than its own
  // had.
  bool ease(Step& step, std::size_t first, std::size_t part) const {
    Item& out = step.items[first];
    Part const &from = step.parts[out.part], &to = step.parts[part];
    for (std::size_t second = 0; second <= step.items.size(); ++second) {
      bool const exchange = second < step.items.size();
      if (exchange ? step.items[second].part != part : from.count == 1) {
        continue;
      }
      std::int64_t const back = exchange ? job_.tokens[step.items[second].sample] : 0;
      double const moved = squares_of(out.sample) - (exchange ? squares_of(step.items[second].sample) : 0);
      bool const better = moved > 0 && to.squares + moved < from.squares;
      if (better && fits(to, job_.tokens[out.sample] - back)) {
        std::size_t const own = out.part;
        if (exchange) {
          place(step, step.items[second], own);
        }
        place(step, out, part);
        return true;
      }
    }
    return false;
  }

  void place(Step& step, Item& item, std::size_t part) const {
    count(step, item, -1);
    item.part = part;
    count(step, item, 1);
  }

  template <class T>
  static T steep(T load) {
    T const square = load * load, fourth = square * square;
    return load + T{kSteep} * fourth * fourth;
  }

  // Of the part with most squares; `more` are added to those of one part.
  double attention(Step const& step, std::size_t at = 0, double more = 0) const {
    double most = 0;
    for (std::size_t part = 0; part < job_.num_parts; ++part) {
      most = std::max(most, step.parts[part].squares + (part == at ? more : 0));
    }
    return job_.attention * static_cast<double>(job_.num_layers) * steep(most * per_square_);
  }

  // The sum over layers of what the fullest rank's load costs, with the loads of a sample added and another's taken
  // away; either may be missing. room: [L]. The eighth power makes the worst layer count for more than its time does.
  double cost(Step const& step, float const* in, float const* out, std::vector<float>& room) const {
    std::size_t const layers = job_.num_layers;
    float* highest = room.data();
    std::fill_n(highest, layers, 0.0F);
    for (std::size_t at = 0; at < width_; at += layers) {
      float const* load = step.loads.data() + at;
      for (std::size_t layer = 0; in && out && layer < layers; ++layer) {
        highest[layer] = std::max(highest[layer], load[layer] + (in[at + layer] - out[at + layer]));
      }
      for (std::size_t layer = 0; !(in && out) && layer < layers; ++layer) {
        float const change = (in ? in[at + layer] : 0.0F) - (out ? out[at + layer] : 0.0F);
        highest[layer] = std::max(highest[layer], load[layer] + change);
      }
    }
    float lanes[kLanes] = {};
    for (std::size_t layer = 0; layer < layers; ++layer) {
      lanes[layer % kLanes] += steep(highest[layer] * per_load_);
    }
    return std::accumulate(lanes, lanes + kLanes, 0.0F);
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
  float per_load_;
  double per_square_;
};

}  // namespace r3
