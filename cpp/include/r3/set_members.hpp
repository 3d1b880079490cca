// The members of sets from the sets' ranks. Ranks count from 1 here, so that each has a leading bit.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "r3/sets.hpp"

namespace r3 {

static_assert(std::numeric_limits<double>::is_iec559, "leading bits of ranks are read off doubles");

// Ranks up to 2^52 are held as doubles, because these begin with their leading bits. In units of the smallest normal
// double nothing has to be taken off the exponent, which is 1 for a rank of 1; smaller ones, which a thread may have
// set to be flushed to 0, do not occur.
inline constexpr double kRankUnit = 0x1p-1022;
inline constexpr std::uint64_t kMostOfDouble = std::uint64_t{1} << 52;
inline constexpr double kBase = kMostOfDouble * kRankUnit;  // its bits and a rank's add up to those of their sum

inline double as_double(std::uint64_t rank) {
  return std::bit_cast<double>(std::bit_cast<std::uint64_t>(kBase) + rank) - kBase;
}
inline std::uint64_t as_whole(double rank) {
  return std::bit_cast<std::uint64_t>(rank + kBase) - std::bit_cast<std::uint64_t>(kBase);
}

// Bits that are in the order of ranks; those of doubles are compared faster than the doubles.
inline std::uint64_t order(double rank) { return std::bit_cast<std::uint64_t>(rank); }
template <class Word>
Word order(Word rank) {
  return rank;
}

// Finds the i-th member of a set: the largest c with C(c, i) < rank. A rank's leading bits leave only two to choose
// from.
template <class Rank>
struct SetLevel {
  unsigned bits = 0;                      // leading bits that count, besides the first
  Rank const* binomials = nullptr;        // C(c, i)
  std::uint16_t const* starts = nullptr;  // the smaller c of each bucket of ranks

  std::size_t bucket(Rank rank) const {
    if constexpr (std::is_same_v<Rank, double>) {
      return static_cast<std::size_t>(order(rank) >> (52 - bits));
    } else {
      std::size_t const shift = top_bit<Rank>(rank | (Rank{1} << bits)) - bits;
      return (shift << bits) + static_cast<std::size_t>(rank >> shift);
    }
  }

  std::size_t find(Rank rank) const {
    std::size_t const c = starts[bucket(rank)];
    return c + (order(binomials[c + 1]) < order(rank));
  }
};

// The levels of the i-th members for i from first to last, of sets of one E and K.
template <class Rank>
class SetLevels {
 public:
  SetLevels(std::size_t num_experts, std::size_t topk, std::size_t first, std::size_t last, Rank unit)
      : unit_(unit), binomials_(make_binomials<Rank>(num_experts, topk, unit)) {
    for (std::size_t i = first; i <= last; ++i) {
      Level& level = levels_[i];
      level.binomials = binomials_.data() + i * (num_experts + 1);
      do {
        ++level.bits;
      } while (!fill(i, num_experts - (topk - i)));
      level.starts = starts_[i].data();
    }
  }

  SetLevels(SetLevels const&) = delete;  // levels point to the tables

  // Takes the i-th members off several ranks and writes them, each k ids behind the one before. It is a chain of
  // lookups for each rank, so these go side by side.
  template <std::size_t kSets, class Id>
  void take(std::size_t i, std::array<Rank, kSets>& ranks, Id* out, std::size_t k) const {
    Level const level = levels_[i];  // a copy, because a byte that is written could be any of the original's
#pragma GCC unroll 16
    for (std::size_t set = 0; set < kSets; ++set) {
      std::size_t const c = level.find(ranks[set]);
      ranks[set] -= level.binomials[c];
      out[set * k] = static_cast<Id>(c);
    }
  }

 private:
  using Level = SetLevel<Rank>;

  // Remembers the smallest c of each bucket of ranks, where end is above all c; says whether none has more than two.
  bool fill(std::size_t i, std::size_t end) {
    Level const& level = levels_[i];
    auto& starts = starts_[i];
    starts.clear();
    for (std::size_t c = i - 1; c < end; ++c) {
      starts.resize(level.bucket(level.binomials[c + 1]) + 1, static_cast<std::uint16_t>(c));
      if (c > starts[level.bucket(level.binomials[c] + unit_)] + 1u) {
        return false;
      }
    }
    return true;
  }

  Rank unit_;
  std::vector<Rank> binomials_;
  std::array<Level, kMostInSet + 1> levels_;
  std::array<std::vector<std::uint16_t>, kMostInSet + 1> starts_;
};

// The tables of one E and K. A word holds any rank.
template <class Word>
class SetMembers {
 public:
  SetMembers(std::size_t num_experts, std::size_t topk)
      : topk_(topk),
        num_sets_(static_cast<Word>(num_sets(num_experts, topk))),
        num_small_(count_small(num_experts, topk)),
        large_(num_experts, topk, num_small_ + 1, topk, 1),
        small_(num_experts, topk, 2, num_small_, kRankUnit) {
    for (std::size_t c = 0; topk > 1 && num_experts <= 256 && c < num_experts; ++c) {
      for (std::size_t lower = 0; lower < c; ++lower) {
        pairs_.push_back({static_cast<std::uint8_t>(lower), static_cast<std::uint8_t>(c)});
      }
    }
  }

  Word num_ranks() const { return num_sets_; }

  // Writes the sorted ids of several ranks, which count from 0 here and are below num_ranks().
  template <std::size_t K, std::size_t kSets, class Id>
  void write(std::array<Word, kSets> words, Id* out) const {
    std::size_t const k = K == 0 ? topk_ : K;
    std::size_t const last = pairs_.empty() ? 1 : 2;
    std::size_t i = k;
    for (Word& word : words) {
      ++word;
    }
    for (; i > num_small_; --i) {
      large_.take(i, words, out + i - 1, k);
    }
    if (i > last) {
      std::array<double, kSets> ranks;
      for (std::size_t set = 0; set < kSets; ++set) {
        ranks[set] = as_double(static_cast<std::uint64_t>(words[set]));
      }
      for (; i > last; --i) {
        small_.take(i, ranks, out + i - 1, k);
      }
      for (std::size_t set = 0; set < kSets; ++set) {
        words[set] = as_whole(ranks[set]);
      }
    }
    Pair const* pairs = pairs_.data();
    for (std::size_t set = 0; set < kSets; ++set) {
      auto const rest = static_cast<std::size_t>(words[set]) - 1;
      if (last == 1) {
        out[set * k] = static_cast<Id>(rest);  // C(c, 1) = c
      } else {
        Pair const pair = pairs[rest];
        out[set * k] = pair[0];
        out[set * k + 1] = pair[1];
      }
    }
  }

 private:
  using Pair = std::array<std::uint8_t, 2>;

  // Of how many levels all ranks fit in doubles. The i-th of a set's members is below E - (K - i).
  static std::size_t count_small(std::size_t num_experts, std::size_t topk) {
    std::size_t count = 0;
    while (count < topk && num_sets(num_experts - topk + count + 1, count + 1) <= kMostOfDouble) {
      ++count;
    }
    return count;
  }

  std::size_t topk_;
  Word num_sets_;
  std::size_t num_small_;
  SetLevels<Word> large_;
  SetLevels<double> small_;
  std::vector<Pair> pairs_;  // [C(E, 2)]: the last two members at once, of up to 256 experts
};

}  // namespace r3
