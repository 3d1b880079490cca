// How many rows each expert of each layer gets. M: layers; T: rows; K: experts a token; E: experts of a layer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

#include "r3/once.hpp"
#include "r3/segments.hpp"
#include "r3/text.hpp"

namespace r3 {

// ids: [M, T, K]; versions: [T], of which live rows are left out; counts: [M, E], written.
template <class Id>
void count_experts(Id const* ids, std::span<std::int32_t const> versions, std::size_t topk, std::size_t num_layers,
                   std::size_t num_experts, std::int64_t* counts) {
  std::fill_n(counts, num_layers * num_experts, 0);
  for (std::size_t layer = 0; layer < num_layers; ++layer, counts += num_experts) {
    for (std::size_t row = 0; row < versions.size(); ++row, ids += topk) {
      for (std::size_t k = 0; k < topk && versions[row] != kLive; ++k) {
        // As an unsigned number a negative id is too large.
        Id const read = read_once(ids[k]);
        auto const id = static_cast<std::make_unsigned_t<Id>>(read);
        if (id >= num_experts) {
          refuse("id (", +read, ") of local layer ", layer, ", row ", row, " is outside 0 to num_experts (",
                 num_experts, ") - 1");
        }
        ++counts[id];
      }
    }
  }
}

}  // namespace r3
