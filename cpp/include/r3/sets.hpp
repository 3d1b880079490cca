// A route's experts as one number: their set's rank in the combinatorial number system, which is the sum of C(c_i, i)
// over its members c_1 < c_2 < ... < c_K. Ranks are below C(E, K) and take as many bits as that needs. The order of a
// route's ids is lost: a decoded route is sorted. K: experts a token; E: experts of a layer.
#pragma once

#include <algorithm>
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

inline std::size_t set_bytes(std::size_t num_routes, std::size_t bits) { return (num_routes * bits + 7) / 8; }

// C(c, i) times unit as [K + 1, E + 1]; those above all ranks are never asked for, and may be wrong.
template <class Number>
std::vector<Number> make_binomials(std::size_t num_experts, std::size_t topk, Number unit = 1) {
  std::size_t const length = num_experts + 1;
  std::vector<Number> binomials((topk + 1) * length);
  for (std::size_t c = 0; c <= num_experts; ++c) {
    binomials[c] = unit;
    for (std::size_t i = 1; c > 0 && i <= topk; ++i) {
      binomials[i * length + c] = binomials[i * length + c - 1] + binomials[(i - 1) * length + c - 1];
    }
  }
  return binomials;
}

}  // namespace r3
