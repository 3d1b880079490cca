// What each sample sends to each rank, of its tokens at each expert. S: samples; L: layers; E: experts; R: ranks.
#pragma once

#include <cstddef>
#include <cstdint>

namespace r3 {

// counts: [S, L, E]; expert_at: [L, E] the expert of each slot, slots of a rank next to each other, all within E;
// loads: [S, R, L] of samples begin to end, written.
inline void rank_loads(std::int32_t const* counts, std::int32_t const* expert_at, std::size_t num_layers,
                       std::size_t num_experts, std::size_t num_ranks, std::size_t begin, std::size_t end,
                       float* loads) {
  std::size_t const slots = num_experts / num_ranks;
  for (std::size_t sample = begin; sample < end; ++sample) {
    for (std::size_t layer = 0; layer < num_layers; ++layer) {
      std::int32_t const* row = counts + (sample * num_layers + layer) * num_experts;
      std::int32_t const* expert = expert_at + layer * num_experts;
      for (std::size_t rank = 0; rank < num_ranks; ++rank) {
        std::int64_t sum = 0;
        for (std::size_t slot = 0; slot < slots; ++slot) {
          sum += row[*expert++];
        }
        loads[(sample * num_ranks + rank) * num_layers + layer] = static_cast<float>(sum);
      }
    }
  }
}

}  // namespace r3
