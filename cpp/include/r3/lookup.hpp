// Lookups of bytes in a table of bytes: the widest instructions look up 64 at once in registers. One program serves all
// x86-64 processors, so the instructions are chosen when it runs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "r3/pack.hpp"
#include "r3/stream.hpp"
#include "r3/topk.hpp"

#if R3_SSE2 && defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define R3_LOOKUPS 1
#else
#define R3_LOOKUPS 0
#endif

namespace r3 {

inline constexpr std::size_t kLookUpBytes = 64;
inline constexpr std::size_t kByteTable = 256;

// Puts table[id] in the place of each id. ids: a multiple of kLookUpBytes; table: [kByteTable].
using LookUp = void (*)(std::uint8_t* ids, std::size_t count, std::uint8_t const* table);

// Reads K ids at sources[row] + offset for each row, and writes the table's entries one after the other.
template <class Out>
using SlotPackOf = void (*)(std::uint8_t const* const* sources, std::size_t num_rows, std::size_t offset,
                            std::uint8_t const* table, Out* out, Largest<std::uint8_t>& largest);

inline void look_up_plain(std::uint8_t* ids, std::size_t count, std::uint8_t const* table) {
  std::transform(ids, ids + count, ids, [&](std::uint8_t id) { return table[id]; });
}

#if R3_LOOKUPS

// A sixteenth of the table at a time: ids outside of it get the high bit, for which a shuffle gives 0.
[[gnu::target("avx2")]] inline void look_up_avx2(std::uint8_t* ids, std::size_t count, std::uint8_t const* table) {
  __m256i const outside = _mm256_set1_epi8(0x70), step = _mm256_set1_epi8(16);
  for (std::size_t i = 0; i < count; i += 32) {
    auto* place = reinterpret_cast<__m256i*>(ids + i);
    __m256i rest = _mm256_loadu_si256(place), found = _mm256_setzero_si256();
    for (std::size_t part = 0; part < kByteTable; part += 16) {
      auto const lanes = _mm_loadu_si128(reinterpret_cast<__m128i const*>(table + part));
      __m256i const at = _mm256_adds_epu8(rest, outside);
      found = _mm256_or_si256(found, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(lanes), at));
      rest = _mm256_sub_epi8(rest, step);
    }
    _mm256_storeu_si256(place, found);
  }
}

#define R3_VBMI [[gnu::target("avx512f,avx512bw,avx512vbmi")]]

// All of the table lies in four registers, of which two are looked up at once.
struct VbmiTable {
  R3_VBMI explicit VbmiTable(std::uint8_t const* table)
      : a(_mm512_loadu_si512(table)),
        b(_mm512_loadu_si512(table + 64)),
        c(_mm512_loadu_si512(table + 128)),
        d(_mm512_loadu_si512(table + 192)) {}

  R3_VBMI __m512i operator()(__m512i ids) const {
    __m512i const low = _mm512_permutex2var_epi8(a, ids, b), high = _mm512_permutex2var_epi8(c, ids, d);
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(ids), low, high);
  }

  __m512i a, b, c, d;
};

R3_VBMI inline void look_up_vbmi(std::uint8_t* ids, std::size_t count, std::uint8_t const* table) {
  VbmiTable const find(table);
  for (std::size_t i = 0; i < count; i += kLookUpBytes) {
    _mm512_storeu_si512(ids + i, find(_mm512_loadu_si512(ids + i)));
  }
}

template <class Out, std::size_t K, bool kStream>
R3_VBMI void pack_vbmi(std::uint8_t const* const* sources, std::size_t num_rows, std::size_t offset,
                       std::uint8_t const* table, Out* out, Largest<std::uint8_t>& largest) {
  constexpr std::size_t kRows = 16 / K;
  VbmiTable const find(table);
  auto* lanes = reinterpret_cast<__m128i*>(largest.lanes.data());
  __m128i most = _mm_load_si128(lanes);
  for (std::size_t row = 0; row < num_rows; row += 4 * kRows, out += kLookUpBytes) {
    __m128i parts[4];
    for (std::size_t part = 0; part < 4; ++part) {
      auto const* from = sources + row + part * kRows;
      parts[part] = load_rows<K>([&](std::size_t i) { return from[i] + offset; });
      most = _mm_max_epu8(most, parts[part]);
    }
    __m512i ids = _mm512_castsi128_si512(parts[0]);
    ids = _mm512_inserti32x4(ids, parts[1], 1);
    ids = _mm512_inserti32x4(ids, parts[2], 2);
    ids = find(_mm512_inserti32x4(ids, parts[3], 3));
    auto* to = reinterpret_cast<std::byte*>(out);
    constexpr std::size_t kBytes = 16 * sizeof(Out);
    store_widened<kStream, 1, sizeof(Out)>(to, _mm512_maskz_extracti32x4_epi32(15, ids, 0));
    store_widened<kStream, 1, sizeof(Out)>(to + kBytes, _mm512_maskz_extracti32x4_epi32(15, ids, 1));
    store_widened<kStream, 1, sizeof(Out)>(to + 2 * kBytes, _mm512_maskz_extracti32x4_epi32(15, ids, 2));
    store_widened<kStream, 1, sizeof(Out)>(to + 3 * kBytes, _mm512_maskz_extracti32x4_epi32(15, ids, 3));
  }
  _mm_store_si128(lanes, most);
}

inline bool has_vbmi() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi"); }

#endif

inline LookUp find_look_up() {
#if R3_LOOKUPS
  if (has_vbmi()) {
    return &look_up_vbmi;
  }
  if (__builtin_cpu_supports("avx2")) {
    return &look_up_avx2;
  }
#endif
  return &look_up_plain;
}

// Says how to pack rows to this address in one go, a multiple of kLookUpBytes of ids; null where that cannot be.
template <class Out>
SlotPackOf<Out> find_slot_pack([[maybe_unused]] std::size_t topk, [[maybe_unused]] bool stream,
                               [[maybe_unused]] void const* to) {
#if R3_LOOKUPS
  if (has_vbmi() && (!stream || can_stream(to))) {
    return with_topk(topk, [&]<std::size_t K>() -> SlotPackOf<Out> {
      if constexpr (kFillsRegisters<std::uint8_t, Out, K>) {
        return stream ? &pack_vbmi<Out, K, true> : &pack_vbmi<Out, K, false>;
      }
      return nullptr;
    });
  }
#endif
  return nullptr;
}

// Writes ids that lie in the cache in another type, past the cache or not.
template <class Id, class Out>
void widen(Id const* ids, std::size_t count, [[maybe_unused]] bool stream, Out* out) {
  std::size_t i = 0;
#if R3_SSE2
  if constexpr (sizeof(Out) >= sizeof(Id)) {
    constexpr std::size_t kIds = 16 / sizeof(Id);
    auto all = [&]<bool kStream>() {
      for (; i + kIds <= count; i += kIds) {
        auto const some = _mm_loadu_si128(reinterpret_cast<__m128i const*>(ids + i));
        store_widened<kStream, sizeof(Id), sizeof(Out)>(reinterpret_cast<std::byte*>(out + i), some);
      }
    };
    if (stream && can_stream(out)) {
      all.template operator()<true>();
    } else {
      all.template operator()<false>();
    }
  }
#endif
  std::transform(ids + i, ids + count, out + i, [](Id id) { return static_cast<Out>(id); });
}

}  // namespace r3
