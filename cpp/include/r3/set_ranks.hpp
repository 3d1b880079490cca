// The ranks of sets from routes of ids in any order.
#pragma once

#include <array>
#include <cstddef>
#include <vector>

#include "r3/sets.hpp"

namespace r3 {

// Routes of K ids, sorted side by side: the smallest ids of all routes lie together, then the second smallest, and so
// on. Loops over routes are plain, and compilers make vectors of them.
template <class Id, std::size_t K>
class SortedRoutes {
 public:
  static constexpr std::size_t kRoutes = 32;

  explicit SortedRoutes(std::size_t topk) : topk_(K == 0 ? topk : K) {}

  // Takes kRoutes routes; says whether each holds distinct ids below E.
  bool sort(Id const* ids, std::size_t num_experts) {
    std::size_t const k = K == 0 ? topk_ : K;
    for (std::size_t i = 0; i < k; ++i) {
      for (std::size_t route = 0; route < kRoutes; ++route) {
        members_[i][route] = ids[route * k + i];
      }
    }
    for (std::size_t round = 0; round < k; ++round) {
      for (std::size_t i = round % 2; i + 1 < k; i += 2) {
        exchange(members_[i].data(), members_[i + 1].data());
      }
    }
    return good(num_experts);
  }

  Id member(std::size_t route, std::size_t i) const { return members_[i][route]; }

 private:
  static void exchange(Id* __restrict low, Id* __restrict high) {
    for (std::size_t route = 0; route < kRoutes; ++route) {
      Id const a = low[route], b = high[route];
      low[route] = a < b ? a : b;
      high[route] = a < b ? b : a;
    }
  }

  // Of a sorted route the last id is the largest, and equal ones are neighbours.
  bool good(std::size_t num_experts) const {
    std::size_t const k = K == 0 ? topk_ : K;
    auto const most = static_cast<Id>(num_experts - 1);
    std::array<Id, kRoutes> wrong;
    for (std::size_t route = 0; route < kRoutes; ++route) {
      wrong[route] = members_[k - 1][route] > most;
    }
    for (std::size_t i = 0; i + 1 < k; ++i) {
      for (std::size_t route = 0; route < kRoutes; ++route) {
        wrong[route] = static_cast<Id>(wrong[route] | (members_[i][route] == members_[i + 1][route]));
      }
    }
    Id any = 0;
    for (Id route : wrong) {
      any = static_cast<Id>(any | route);
    }
    return any == 0;
  }

  std::size_t topk_;
  std::array<std::array<Id, kRoutes>, K == 0 ? kMostInSet : K> members_;
};

// The table that ranks sets of one E and K. A word is 64 bits where ranks fit, else 128.
template <class Word>
class SetRanks {
 public:
  SetRanks(std::size_t num_experts, std::size_t topk)
      : num_experts_(num_experts), topk_(topk), binomials_(make_binomials<Word>(num_experts, topk)) {}

  template <class Id, std::size_t K>
  Word rank(SortedRoutes<Id, K> const& routes, std::size_t route) const {
    std::size_t const k = K == 0 ? topk_ : K;
    Word rank = routes.member(route, 0);  // C(c, 1) = c
    Word const* binomials = binomials_.data() + num_experts_ + 1;
    for (std::size_t i = 1; i < k; ++i) {
      binomials += num_experts_ + 1;
      rank += binomials[routes.member(route, i)];
    }
    return rank;
  }

 private:
  std::size_t num_experts_;
  std::size_t topk_;
  std::vector<Word> binomials_;
};

}  // namespace r3
