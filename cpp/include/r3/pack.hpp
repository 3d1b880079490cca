// Ids of one layer of some rows, side by side and in another type: the innermost loops of repack.
// K: experts a token.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "r3/stream.hpp"
#include "r3/topk.hpp"

namespace r3 {

// The largest of the ids that were packed, kept in lanes so that it costs one instruction for many ids.
template <class Id>
struct Largest {
  alignas(16) std::array<Id, 16 / sizeof(Id)> lanes{};

  void add(Id id) { lanes[0] = std::max(lanes[0], id); }
  Id value() const { return *std::ranges::max_element(lanes); }
};

// Reads K ids at sources[row] + offset for each of num_rows rows, and writes them one after the other.
template <class Id, class Out>
using Pack = void (*)(Id const* const* sources, std::size_t num_rows, std::size_t offset, std::size_t topk, Out* out,
                      Largest<Id>& largest);

// K is 0 where it is known at run time only.
template <class Id, class Out, std::size_t K>
void pack_plain(Id const* const* sources, std::size_t num_rows, std::size_t offset, std::size_t topk, Out* out,
                Largest<Id>& largest) {
  std::size_t const k = K == 0 ? topk : K;
  Id most = 0;
  for (std::size_t row = 0; row < num_rows; ++row, out += k) {
    Id const* ids = sources[row] + offset;
    for (std::size_t i = 0; i < k; ++i) {
      Id const id = ids[i];  // read once: what is written is what was looked at
      out[i] = static_cast<Out>(id);
      most = std::max(most, id);
    }
  }
  largest.add(most);
}

// Ids that a row has of a layer fill 16 bytes, or a half or a quarter of them, and do not become narrower.
template <class Id, class Out, std::size_t K>
inline constexpr bool kFillsRegisters =
    R3_SSE2 && sizeof(Out) >= sizeof(Id) && (K * sizeof(Id) == 4 || K * sizeof(Id) == 8 || K * sizeof(Id) == 16);

#if R3_SSE2

template <class Id, class Out, std::size_t K, bool kStream>
void pack_registers(Id const* const* sources, std::size_t num_rows, std::size_t offset, std::size_t topk, Out* out,
                    Largest<Id>& largest) {
  constexpr std::size_t kRows = 16 / (K * sizeof(Id));
  auto* lanes = reinterpret_cast<__m128i*>(largest.lanes.data());
  __m128i most = _mm_load_si128(lanes);
  std::size_t row = 0;
  auto step = [&] {
    __m128i const ids = load_rows<K * sizeof(Id)>([&](std::size_t i) { return sources[row + i] + offset; });
    most = larger<sizeof(Id)>(most, ids);
    store_widened<kStream, sizeof(Id), sizeof(Out)>(reinterpret_cast<std::byte*>(out), ids);
    row += kRows, out += kRows * K;
  };
  while (row + 4 * kRows <= num_rows) {  // unrolled: it is instructions that cost here
    step(), step(), step(), step();
  }
  while (row + kRows <= num_rows) {
    step();
  }
  _mm_store_si128(lanes, most);
  pack_plain<Id, Out, K>(sources + row, num_rows - row, offset, topk, out, largest);
}

#endif

// Packs into the cache and streams from there, for what does not fill registers or is not aligned.
template <class Id, class Out, std::size_t K>
void pack_staged(Id const* const* sources, std::size_t num_rows, std::size_t offset, std::size_t topk, Out* out,
                 Largest<Id>& largest) {
  constexpr std::size_t kBytes = std::size_t{1} << 13;
  alignas(kLine) Out stage[kBytes / sizeof(Out)];
  std::size_t const k = K == 0 ? topk : K;
  std::size_t const rows_of_stage = kBytes / sizeof(Out) / k;
  if (rows_of_stage == 0) {
    pack_plain<Id, Out, K>(sources, num_rows, offset, topk, out, largest);
    return;
  }
  for (std::size_t row = 0; row < num_rows; row += rows_of_stage) {
    std::size_t const n = std::min(rows_of_stage, num_rows - row);
    pack_plain<Id, Out, K>(sources + row, n, offset, topk, stage, largest);
    stream_bytes(reinterpret_cast<std::byte*>(out + row * k), reinterpret_cast<std::byte const*>(stage),
                 n * k * sizeof(Out));
  }
}

// Says how to pack rows to this address: past the cache or not.
template <class Id, class Out>
Pack<Id, Out> find_pack(std::size_t topk, bool stream, [[maybe_unused]] void const* to) {
  return with_topk(topk, [&]<std::size_t K>() -> Pack<Id, Out> {
#if R3_SSE2
    if constexpr (kFillsRegisters<Id, Out, K>) {
      if (!stream) {
        return &pack_registers<Id, Out, K, false>;
      }
      if (can_stream(to)) {
        return &pack_registers<Id, Out, K, true>;
      }
    }
#endif
    return stream ? &pack_staged<Id, Out, K> : &pack_plain<Id, Out, K>;
  });
}

// How many rows to pack before going to the next layer: enough to write some whole lines, and few enough for the rows
// to be in the cache until the last layer is packed.
inline constexpr std::size_t kMostRowsOfBlock = 64;

template <class Out>
std::size_t block_rows(std::size_t topk) {
  std::size_t const rows = 16 * kLine / (topk * sizeof(Out));
  return rows >= 64 ? kMostRowsOfBlock : rows >= 32 ? 32 : rows >= 16 ? 16 : 8;
}

}  // namespace r3
