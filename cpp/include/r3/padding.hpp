#pragma once

#include <cstddef>
#include <vector>

#include "r3/text.hpp"

namespace r3 {

// Returns all experts in an order that alternates the expert parallel ranks, and again the first K of them: K ids that
// begin anywhere are distinct, and rows of K ids, one after the other, load ranks and experts evenly.
// Expert e belongs to expert parallel rank e / (E / ep_size).
template <class Id>
std::vector<Id> padding_walk(std::size_t num_experts, std::size_t ep_size, std::size_t topk) {
  if (ep_size < 1 || num_experts % ep_size != 0) {
    refuse("ep_size (", ep_size, ") does not divide num_experts (", num_experts, ")");
  }
  std::size_t const experts_of_rank = num_experts / ep_size;
  std::vector<Id> walk(num_experts + topk);
  for (std::size_t i = 0; i < walk.size(); ++i) {
    std::size_t const step = i % num_experts;
    walk[i] = static_cast<Id>(step % ep_size * experts_of_rank + step / ep_size);
  }
  return walk;
}

}  // namespace r3
