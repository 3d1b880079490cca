// A row's experts as one number: their set's rank in the combinatorial number system, which is the sum of C(c_i, i)
// over its members c_1 < c_2 < ... < c_K. Ranks are below C(E, K) and take as many bits as that needs. The order of a
// row's ids is lost: a decoded row is sorted. K: experts a token; E: experts of a layer.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "r3/text.hpp"

namespace r3 {

__extension__ using Wide = unsigned __int128;

inline constexpr std::size_t kMostInSet = 16;      // K
inline constexpr std::size_t kMostExperts = 1024;  // E; a rank of 16 of them needs 116 bits

// The place of the highest bit of a word that is not 0.
template <class Word>
std::size_t top_bit(Word word) {
  if constexpr (sizeof(Word) == 8) {
    return static_cast<std::size_t>(63 ^ __builtin_clzll(word));
  } else {
    auto const high = static_cast<std::uint64_t>(word >> 64);
    return high != 0 ? 64 + top_bit(high) : top_bit(static_cast<std::uint64_t>(word));
  }
}

inline void check_set_size(std::size_t num_experts, std::size_t topk) {
  if (num_experts < 1 || num_experts > kMostExperts) {
    refuse("num_experts (", num_experts, ") outside 1 to ", kMostExperts, " of set coding");
  }
  if (topk < 1 || topk > std::min(num_experts, kMostInSet)) {
    refuse("topk (", topk, ") outside 1 to ", std::min(num_experts, kMostInSet), " of set coding of ", num_experts,
           " experts");
  }
}

// C(E, K), which 128 bits hold for all E and K that are allowed.
inline Wide num_sets(std::size_t num_experts, std::size_t topk) {
  Wide result = 1;
  for (std::size_t i = 1; i <= topk; ++i) {
    result = result * (num_experts - topk + i) / i;  // C(n - k + i, i), always whole
  }
  return result;
}

// How many bits a rank takes: the least that can tell all sets apart.
inline std::size_t set_bits(std::size_t num_experts, std::size_t topk) {
  check_set_size(num_experts, topk);
  Wide const most = num_sets(num_experts, topk) - 1;
  return most == 0 ? 0 : top_bit(most) + 1;
}

inline std::size_t set_bytes(std::size_t num_rows, std::size_t bits) { return (num_rows * bits + 7) / 8; }

// The tables of one E and K. A word is 64 bits where ranks fit, else 128.
template <class Word>
class SetCode {
 public:
  SetCode(std::size_t num_experts, std::size_t topk)
      : num_experts_(num_experts),
        topk_(topk),
        bits_(set_bits(num_experts, topk)),
        num_sets_(static_cast<Word>(num_sets(num_experts, topk))),
        binomials_((topk + 1) * (num_experts + 1)) {
    for (std::size_t c = 0; c <= num_experts; ++c) {
      binomial(0, c) = 1;
      for (std::size_t i = 1; c > 0 && i <= topk; ++i) {
        // Larger ones are never asked for, and wrap around.
        binomial(i, c) = binomial(i, c - 1) + binomial(i - 1, c - 1);
      }
    }
    for (std::size_t i = 2; i <= topk; ++i) {
      levels_[i] = make_level(i);
    }
    for (std::size_t c = 0; topk > 1 && num_experts <= 256 && c < num_experts; ++c) {
      for (std::size_t lower = 0; lower < c; ++lower) {
        pairs_.push_back({static_cast<std::uint8_t>(lower), static_cast<std::uint8_t>(c)});
      }
    }
  }

  std::size_t num_experts() const { return num_experts_; }
  std::size_t topk() const { return topk_; }
  std::size_t bits() const { return bits_; }
  Word num_ranks() const { return num_sets_; }

  // The rank of K distinct ids below E in any order: an id's place in the order is how many others are smaller.
  template <std::size_t K, class Id>
  Word rank(Id const* ids) const {
    std::size_t const k = K == 0 ? topk_ : K;
    std::array<Id, K == 0 ? kMostInSet : K> place{};
    for (std::size_t i = 0; i < k; ++i) {
      for (std::size_t j = 0; j < k; ++j) {
        place[j] = static_cast<Id>(place[j] + (ids[i] <= ids[j]));
      }
    }
    Word rank = 0;
    for (std::size_t i = 0; i < k; ++i) {
      rank += binomials_[place[i] * (num_experts_ + 1) + ids[i]];
    }
    return rank;
  }

  // Writes the sorted ids of several ranks below num_ranks(); side by side, because each is a chain of lookups.
  template <std::size_t K, std::size_t kSets, class Id>
  void members(std::array<Word, kSets> ranks, Id* out) const {
    std::size_t const k = K == 0 ? topk_ : K;
    std::size_t const last = pairs_.empty() ? 1 : 2;
    for (std::size_t i = k; i > last; --i) {
      Level const& level = levels_[i];
      Word const* binomials = binomials_.data() + i * (num_experts_ + 1);
      for (std::size_t set = 0; set < kSets; ++set) {
        std::size_t c = level.starts[level.bucket(ranks[set])];
        c += binomials[c + 1] <= ranks[set];
        ranks[set] -= binomials[c];
        out[set * k + i - 1] = static_cast<Id>(c);
      }
    }
    for (std::size_t set = 0; set < kSets; ++set) {
      if (last == 1) {
        out[set * k] = static_cast<Id>(ranks[set]);  // C(c, 1) = c
      } else {
        Pair const& pair = pairs_[static_cast<std::size_t>(ranks[set])];
        out[set * k] = pair[0];
        out[set * k + 1] = pair[1];
      }
    }
  }

 private:
  using Pair = std::array<std::uint8_t, 2>;

  // Finds the largest c with C(c, i) <= rank: a rank's leading bits leave only two to choose from.
  struct Level {
    unsigned bits = 0;  // leading bits that count, besides the first
    std::vector<std::uint16_t> starts;

    std::size_t bucket(Word rank) const {
      std::size_t const shift = top_bit<Word>(rank | (Word{1} << bits)) - bits;
      return (shift << bits) + static_cast<std::size_t>(rank >> shift);
    }
  };

  Word& binomial(std::size_t i, std::size_t c) { return binomials_[i * (num_experts_ + 1) + c]; }

  // Takes as many leading bits as needed, and remembers the smaller c of each bucket of ranks.
  Level make_level(std::size_t i) {
    // The i-th of a set's members is at most E - 1 - (K - i), and binomials of larger ones are not needed.
    std::size_t const end = num_experts_ - (topk_ - i);
    for (unsigned bits = 1;; ++bits) {
      Level level{bits, {}};
      bool narrow = true;
      std::size_t c = i - 1;
      for (Word first = 0, next = 0; narrow && first < binomial(i, end); first = next) {
        next = first + (Word{1} << (top_bit<Word>(first | (Word{1} << bits)) - bits));
        while (c + 1 < end && binomial(i, c + 1) <= first) {
          ++c;
        }
        narrow = c + 2 >= end || binomial(i, c + 2) >= next;
        level.starts.push_back(static_cast<std::uint16_t>(c));
      }
      if (narrow) {
        return level;
      }
    }
  }

  std::size_t num_experts_;
  std::size_t topk_;
  std::size_t bits_;
  Word num_sets_;
  std::vector<Word> binomials_;  // [K + 1, E + 1]: C(c, i)
  std::array<Level, kMostInSet + 1> levels_;
  std::vector<Pair> pairs_;  // [C(E, 2)]: the last two members at once, of up to 256 experts
};

}  // namespace r3
