// Which route of a trace is wrong. S: tokens; M: MoE layers; K: experts a token; E: experts of a layer.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "r3/once.hpp"
#include "r3/topk.hpp"

namespace r3 {

// Several ids in one 64-bit word, compared all at once.
template <class Id>
struct Lanes {
  static constexpr int kBits = std::numeric_limits<Id>::digits;
  static constexpr std::size_t kCount = 64 / kBits;
  static constexpr std::uint64_t kOnes = ~std::uint64_t{0} / std::numeric_limits<Id>::max();
  static constexpr std::uint64_t kHigh = kOnes << (kBits - 1);
  static constexpr std::uint64_t kHalf = std::uint64_t{1} << (kBits - 1);

  // Adding `room` to the low bits of a lane carries into its high bit when they reach the limit. Below half the limit
  // that bit or the lane's own says "too large"; above half both together do.
  explicit Lanes(std::uint64_t num_experts)
      : room(kOnes * ((num_experts <= kHalf ? kHalf : 2 * kHalf) - num_experts)),
        low_limit(num_experts <= kHalf ? ~std::uint64_t{0} : 0) {}

  // Non-zero if a lane is zero.
  static std::uint64_t zero(std::uint64_t word) { return (word - kOnes) & ~word & kHigh; }

  // Non-zero if a lane is not below the number of experts.
  std::uint64_t too_large(std::uint64_t word) const {
    std::uint64_t const sum = (word & ~kHigh) + room;
    return (sum | (word & low_limit)) & (word | low_limit) & kHigh;
  }

  std::uint64_t room;
  std::uint64_t low_limit;
};

// Checks a route that fills whole words: each id meets each other one in some rotation of its word.
template <class Id, std::size_t K>
std::uint64_t wrong_words(Id const* route, Lanes<Id> const& lanes) {
  constexpr std::size_t kWords = K * sizeof(Id) / 8;
  std::uint64_t words[kWords];
  std::memcpy(words, route, sizeof words);
  std::uint64_t wrong = 0;
  for (std::size_t i = 0; i < kWords; ++i) {
    wrong |= lanes.too_large(words[i]);
    for (std::size_t turn = 1; turn <= Lanes<Id>::kCount / 2; ++turn) {
      wrong |= Lanes<Id>::zero(words[i] ^ std::rotl(words[i], static_cast<int>(turn) * Lanes<Id>::kBits));
    }
    for (std::size_t j = i + 1; j < kWords; ++j) {
      for (std::size_t turn = 0; turn < Lanes<Id>::kCount; ++turn) {
        wrong |= Lanes<Id>::zero(words[i] ^ std::rotl(words[j], static_cast<int>(turn) * Lanes<Id>::kBits));
      }
    }
  }
  return wrong;
}

// Checks a route of a K known at compile time by pairs.
template <class Id, std::size_t K>
std::uint64_t wrong_pairs(Id const* route, std::size_t num_experts) {
  unsigned wrong = 0;
  for (std::size_t i = 0; i < K; ++i) {
    wrong |= static_cast<unsigned>(route[i] >= num_experts);
    for (std::size_t j = i + 1; j < K; ++j) {
      wrong |= static_cast<unsigned>(route[i] == route[j]);
    }
  }
  return wrong;
}

// Says whether a captured route is wrong; K is 0 where it is known at run time only.
template <class Id, std::size_t K>
class RouteCheck {
 public:
  RouteCheck(std::size_t num_experts, std::size_t topk) : num_experts_(num_experts), topk_(topk), lanes_(num_experts) {
    if constexpr (!kWords && !kPairs) {
      last_route_.resize(num_experts, 0);
    }
  }

  std::uint64_t operator()(Id const* route) {
    if constexpr (kWords) {
      return wrong_words<Id, K>(route, lanes_);
    } else if constexpr (kPairs) {
      return wrong_pairs<Id, K>(route, num_experts_);
    } else {
      return by_last_route(route);
    }
  }

 private:
  static constexpr bool kWords = K > 0 && K * sizeof(Id) % 8 == 0;
  static constexpr bool kPairs = K > 0 && K <= 8;

  // An id that was last seen in this very route is there twice.
  std::uint64_t by_last_route(Id const* route) {
    ++route_number_;
    for (std::size_t k = 0; k < topk_; ++k) {
      std::size_t const id = read_once(route[k]);
      if (id >= num_experts_ || std::exchange(last_route_[id], route_number_) == route_number_) {
        return 1;
      }
    }
    return 0;
  }

  std::size_t num_experts_;
  std::size_t topk_;
  Lanes<Id> lanes_;
  std::uint64_t route_number_ = 0;
  std::vector<std::uint64_t> last_route_;
};

template <class Id, std::size_t K>
std::optional<std::pair<std::size_t, std::size_t>> find_bad_route_of(Id const* ids, std::int32_t const* versions,
                                                                     std::size_t num_tokens, std::size_t num_layers,
                                                                     std::size_t topk, std::size_t num_experts) {
  RouteCheck<Id, K> check(num_experts, topk);
  std::size_t const k = K == 0 ? topk : K;
  auto wrong = [&](std::size_t token, std::size_t layer) -> std::uint64_t {
    Id const* route = ids + (token * num_layers + layer) * k;
    if (versions[token] >= 0) {
      return check(route);
    }
    std::uint64_t set = 0;
    for (std::size_t i = 0; i < k; ++i) {
      set |= route[i];
    }
    return set;
  };
  for (std::size_t token = 0; token < num_tokens; ++token) {
    // The layers of a token are joined without a branch; only where one is wrong it is looked for.
    std::uint64_t any = 0;
    for (std::size_t layer = 0; layer < num_layers; ++layer) {
      any |= wrong(token, layer);
    }
    for (std::size_t layer = 0; any != 0 && layer < num_layers; ++layer) {
      // If none is wrong any more, because another thread writes them, the last one is named.
      if (wrong(token, layer) != 0 || layer + 1 == num_layers) {
        return std::pair(token, layer);
      }
    }
  }
  return std::nullopt;
}

// Returns (token, layer) of the first wrong route, or nothing.
// ids: [S, M, K]; versions: [S]; a captured token (version >= 0) needs distinct ids below E, another only zeros.
template <class Id>
std::optional<std::pair<std::size_t, std::size_t>> find_bad_route(Id const* ids, std::int32_t const* versions,
                                                                  std::size_t num_tokens, std::size_t num_layers,
                                                                  std::size_t topk, std::size_t num_experts) {
  return with_topk(topk, [&]<std::size_t K>() {
    return find_bad_route_of<Id, K>(ids, versions, num_tokens, num_layers, topk, num_experts);
  });
}

}  // namespace r3
