// Copies with streaming stores, which bypass the cache: a line that is written once and not read soon need not be
// loaded first. 16-byte stores that fill a line in order are as fast as wider ones here, so the instructions of every
// x86-64 processor are enough; other architectures use plain stores.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#define R3_SSE2 1
#else
#define R3_SSE2 0
#endif

namespace r3 {

inline constexpr std::size_t kLine = 64;

// Whether stores of 16 bytes can go past the cache at this address.
inline bool can_stream(void const* address) { return R3_SSE2 && reinterpret_cast<std::uintptr_t>(address) % 16 == 0; }

// Makes streaming stores visible to other threads.
inline void finish_stores() {
#if R3_SSE2
  _mm_sfence();
#endif
}

// Prefetches a line into the second-level cache; the first level is too small to hold it until it is used.
[[gnu::always_inline]] inline void prefetch(void const* address) { __builtin_prefetch(address, 0, 2); }

#if R3_SSE2

template <bool kStream>
void store16(std::byte* to, __m128i value) {
  if constexpr (kStream) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), value);
  } else {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value);
  }
}

// Stores 16 bytes of unsigned numbers of kFrom bytes as numbers of kTo bytes.
template <bool kStream, std::size_t kFrom, std::size_t kTo>
void store_widened(std::byte* to, __m128i value) {
  if constexpr (kFrom == kTo) {
    store16<kStream>(to, value);
  } else {
    __m128i const zero = _mm_setzero_si128();
    __m128i low, high;
    if constexpr (kFrom == 1) {
      low = _mm_unpacklo_epi8(value, zero), high = _mm_unpackhi_epi8(value, zero);
    } else if constexpr (kFrom == 2) {
      low = _mm_unpacklo_epi16(value, zero), high = _mm_unpackhi_epi16(value, zero);
    } else {
      low = _mm_unpacklo_epi32(value, zero), high = _mm_unpackhi_epi32(value, zero);
    }
    store_widened<kStream, 2 * kFrom, kTo>(to, low);
    store_widened<kStream, 2 * kFrom, kTo>(to + 8 * kTo / kFrom, high);
  }
}

// The larger of each two unsigned numbers of kBytes.
template <std::size_t kBytes>
__m128i larger(__m128i a, __m128i b) {
  if constexpr (kBytes == 1) {
    return _mm_max_epu8(a, b);
  } else {
    static_assert(kBytes == 2);
    return _mm_add_epi16(a, _mm_subs_epu16(b, a));
  }
}

// Loads pieces of kBytes from as many rows as fill 16 bytes.
template <std::size_t kBytes, class Row>
__m128i load_rows(Row row) {
  if constexpr (kBytes == 16) {
    return _mm_loadu_si128(reinterpret_cast<__m128i const*>(row(0)));
  } else if constexpr (kBytes == 8) {
    __m128i const first = _mm_loadl_epi64(reinterpret_cast<__m128i const*>(row(0)));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(first), reinterpret_cast<__m64 const*>(row(1))));
  } else {
    static_assert(kBytes == 4);
    std::int32_t words[4];
    for (std::size_t i = 0; i < 4; ++i) {
      std::memcpy(&words[i], row(i), 4);
    }
    return _mm_set_epi32(words[3], words[2], words[1], words[0]);
  }
}

#endif

// Copies bytes that lie in the cache to where they are not read soon.
inline void stream_bytes(std::byte* to, std::byte const* from, std::size_t size) {
#if R3_SSE2
  std::size_t const ragged = -reinterpret_cast<std::uintptr_t>(to) % 16;
  if (size >= 32) {
    std::memcpy(to, from, ragged);
    to += ragged, from += ragged, size -= ragged;
    for (; size >= 16; to += 16, from += 16, size -= 16) {
      store16<true>(to, _mm_loadu_si128(reinterpret_cast<__m128i const*>(from)));
    }
  }
#endif
  std::memcpy(to, from, size);
}

}  // namespace r3
