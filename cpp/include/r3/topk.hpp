#pragma once

#include <cstddef>

namespace r3 {

// Calls action.operator()<K>() with K = topk where that is worth a specialisation, else with K = 0.
template <class Action>
auto with_topk(std::size_t topk, Action action) {
  switch (topk) {
    case 1:
      return action.template operator()<1>();
    case 2:
      return action.template operator()<2>();
    case 4:
      return action.template operator()<4>();
    case 6:
      return action.template operator()<6>();
    case 8:
      return action.template operator()<8>();
    case 10:
      return action.template operator()<10>();
    case 16:
      return action.template operator()<16>();
    default:
      return action.template operator()<0>();
  }
}

}  // namespace r3
