// Routes of ids as ranks of sets, bit after bit, and back.
// S: tokens; M: MoE layers; K: experts a token; E: experts of a layer.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "r3/set_members.hpp"
#include "r3/set_ranks.hpp"
#include "r3/sets.hpp"
#include "r3/topk.hpp"

namespace r3 {

static_assert(std::endian::native == std::endian::little, "codes and traces are little-endian");

// Writes numbers of a fixed width one after the other, low bits first.
template <class Word>
class BitWriter {
 public:
  BitWriter(std::byte* to, std::size_t bits) : to_(to), bits_(bits) {}

  void write(Word word) {
    put(static_cast<std::uint64_t>(word), std::min<std::size_t>(bits_, 64));
    if constexpr (sizeof(Word) > 8) {
      put(static_cast<std::uint64_t>(word >> 64), bits_ - std::min<std::size_t>(bits_, 64));
    }
  }

  void finish() {
    if (num_held_ > 0) {
      std::memcpy(to_, &held_, (num_held_ + 7) / 8);
    }
  }

 private:
  // Takes up to 64 bits, with zeros above them, to the fewer than 64 that are held.
  void put(std::uint64_t value, std::size_t num_bits) {
    held_ |= value << num_held_;
    if (num_held_ + num_bits < 64) {
      num_held_ += num_bits;
      return;
    }
    std::memcpy(to_, &held_, 8);
    to_ += 8;
    held_ = num_held_ == 0 ? 0 : value >> (64 - num_held_);
    num_held_ = num_held_ + num_bits - 64;
  }

  std::byte* to_;
  std::size_t bits_;
  std::uint64_t held_ = 0;
  std::size_t num_held_ = 0;
};

// Reads numbers of a fixed width; never looks behind the end.
template <class Word>
class BitReader {
 public:
  BitReader(std::span<std::byte const> from, std::size_t bits)
      : from_(from), bits_(bits), mask_(bits == 8 * sizeof(Word) ? ~Word{0} : (Word{1} << bits) - 1) {}

  // Reads several one after the other.
  template <std::size_t kCount>
  std::array<Word, kCount> read(std::size_t number) const {
    std::array<Word, kCount> words;
    std::size_t const begin = number * bits_;
    // Where each is wholly in the word at its first byte.
    if (bits_ + 7 <= 8 * sizeof(Word) && (begin + (kCount - 1) * bits_) / 8 + sizeof(Word) <= from_.size()) [[likely]] {
      for (std::size_t i = 0; i < kCount; ++i) {
        std::size_t const bit = begin + i * bits_;
        std::memcpy(&words[i], from_.data() + bit / 8, sizeof(Word));
        words[i] = words[i] >> (bit % 8) & mask_;
      }
    } else {
      for (std::size_t i = 0; i < kCount; ++i) {
        words[i] = read_one(number + i);
      }
    }
    return words;
  }

 private:
  Word read_one(std::size_t number) const {
    std::size_t const bit = number * bits_, byte = bit / 8;
    unsigned const shift = bit % 8;
    if (byte + sizeof(Word) + 1 > from_.size()) [[unlikely]] {
      return near_end(byte, shift);
    }
    Word low;
    std::memcpy(&low, from_.data() + byte, sizeof low);
    low >>= shift;
    if (bits_ + 7 > 8 * sizeof(Word) && shift > 0) {
      low |= static_cast<Word>(from_[byte + sizeof(Word)]) << (8 * sizeof(Word) - shift);
    }
    return low & mask_;
  }

  Word near_end(std::size_t byte, unsigned shift) const {
    std::array<std::byte, sizeof(Word) + 1> bytes{};
    std::copy_n(from_.begin() + static_cast<std::ptrdiff_t>(byte), std::min(bytes.size(), from_.size() - byte),
                bytes.begin());
    Word low;
    std::memcpy(&low, bytes.data(), sizeof low);
    low >>= shift;
    if (shift > 0) {
      low |= static_cast<Word>(bytes.back()) << (8 * sizeof(Word) - shift);
    }
    return low & mask_;
  }

  std::span<std::byte const> from_;
  std::size_t bits_;
  Word mask_;
};

struct SetShape {
  std::size_t num_tokens;   // S
  std::size_t num_layers;   // M
  std::size_t topk;         // K
  std::size_t num_experts;  // E
};

inline std::size_t count_captured(std::span<std::int32_t const> versions) {
  return static_cast<std::size_t>(std::ranges::count_if(versions, [](std::int32_t version) { return version >= 0; }));
}

// Calls action.operator()<Word, K>() with the type that holds ranks and the K that is known at compile time, or 0.
template <class Action>
void with_set_code(SetShape const& shape, Action action) {
  bool const wide = set_bits(shape.num_experts, shape.topk) > 63;
  with_topk(shape.topk, [&]<std::size_t K>() {
    wide ? action.template operator()<Wide, K>() : action.template operator()<std::uint64_t, K>();
  });
}

// Calls action(captured, first, last) for each run of tokens that were captured or were not.
template <class Action>
void for_runs(std::span<std::int32_t const> versions, Action action) {
  for (std::size_t first = 0, last = 0; first < versions.size(); first = last) {
    bool const captured = versions[first] >= 0;
    while (last < versions.size() && (versions[last] >= 0) == captured) {
      ++last;
    }
    action(captured, first, last);
  }
}

// Codes routes of ids; says whether they all hold distinct ids below E.
template <class Word, std::size_t K, class Id>
bool encode_routes(SetRanks<Word> const& ranks, BitWriter<Word>& codes, SetShape const& shape, std::size_t num_routes,
                   Id const* ids) {
  constexpr std::size_t kRoutes = SortedRoutes<Id, K>::kRoutes;
  SortedRoutes<Id, K> routes(shape.topk);
  BitWriter<Word> writer = codes;  // a copy, because a byte that is written could be any of the original's
  std::array<Id, kRoutes * kMostInSet> padded;
  for (std::size_t first = 0; first < num_routes; first += kRoutes) {
    std::size_t const count = std::min(num_routes - first, kRoutes);
    Id const* begin = ids + first * shape.topk;
    if (count < kRoutes) {
      Id* rest = std::copy_n(begin, count * shape.topk, padded.data());
      for (std::size_t i = 0; i < (kRoutes - count) * shape.topk; ++i) {
        rest[i] = static_cast<Id>(i % shape.topk);
      }
      begin = padded.data();
    }
    if (!routes.sort(begin, shape.num_experts)) {
      return false;
    }
    for (std::size_t route = 0; route < count; ++route) {
      writer.write(ranks.rank(routes, route));
    }
  }
  codes = writer;
  return true;
}

// Codes the captured routes of ids, [S, M, K]; refuses routes that are wrong as find_bad_route sees it. codes has
// set_bytes(captured * M, bits) bytes.
template <class Id>
void encode_sets(SetShape const& shape, Id const* ids, std::span<std::int32_t const> versions,
                 std::span<std::byte> codes) {
  with_set_code(shape, [&]<class Word, std::size_t K>() {
    SetRanks<Word> const ranks(shape.num_experts, shape.topk);
    BitWriter<Word> writer(codes.data(), set_bits(shape.num_experts, shape.topk));
    std::size_t const token_size = shape.num_layers * shape.topk;
    for_runs(versions, [&](bool captured, std::size_t first, std::size_t last) {
      Id const* begin = ids + first * token_size;
      if (captured ? !encode_routes<Word, K>(ranks, writer, shape, (last - first) * shape.num_layers, begin)
                   : std::any_of(begin, ids + last * token_size, [](Id id) { return id != 0; })) {
        refuse("topk_ids: a route does not hold distinct ids below num_experts (", shape.num_experts, ")");
      }
    });
    writer.finish();
  });
}

// Decodes the routes first to last of the codes.
template <class Word, std::size_t K, class Id>
void decode_routes(SetMembers<Word> const& members, BitReader<Word> const& reader, std::size_t topk, std::size_t first,
                   std::size_t last, Id* ids) {
  constexpr std::size_t kSets = 16;
  auto decode = [&]<std::size_t kCount>(std::size_t route) {
    auto const ranks = reader.template read<kCount>(route);
    bool const good = *std::ranges::max_element(ranks) < members.num_ranks();
    if (good) {
      members.template write<K>(ranks, ids + (route - first) * topk);
    }
    return good;
  };
  bool good = true;
  std::size_t route = first;
  for (; good && route + kSets <= last; route += kSets) {
    good = decode.template operator()<kSets>(route);
  }
  for (; good && route < last; ++route) {
    good = decode.template operator()<1>(route);
  }
  if (!good) {
    refuse("codes: a rank of routes ", first, " to ", last, " is not below the number of sets");
  }
}

// Writes ids, [S, M, K]: sorted ones in captured routes, 0 in others; refuses codes of another length, ranks that are
// too large, and bits behind the last rank.
template <class Id>
void decode_sets(SetShape const& shape, std::span<std::byte const> codes, std::span<std::int32_t const> versions,
                 Id* ids) {
  std::size_t const bits = set_bits(shape.num_experts, shape.topk);
  std::size_t const num_routes = count_captured(versions) * shape.num_layers;
  if (codes.size() != set_bytes(num_routes, bits)) {
    refuse("codes: ", codes.size(), " bytes != ", set_bytes(num_routes, bits), " of ", num_routes, " routes of ", bits,
           " bits");
  }
  if (num_routes * bits % 8 != 0 && std::to_integer<unsigned>(codes.back()) >> (num_routes * bits % 8) != 0) {
    refuse("codes: bits behind the last route are not 0");
  }
  with_set_code(shape, [&]<class Word, std::size_t K>() {
    SetMembers<Word> const members(shape.num_experts, shape.topk);
    BitReader<Word> const reader(codes, bits);
    std::size_t const token_size = shape.num_layers * shape.topk;
    std::size_t route = 0;
    for_runs(versions, [&](bool captured, std::size_t first, std::size_t last) {
      Id* begin = ids + first * token_size;
      if (captured) {
        std::size_t const end = route + (last - first) * shape.num_layers;
        decode_routes<Word, K>(members, reader, shape.topk, route, end, begin);
        route = end;
      } else {
        std::fill(begin, ids + last * token_size, Id{0});
      }
    });
  });
}

}  // namespace r3
