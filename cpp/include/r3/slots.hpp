// Where a layer's experts lie: their slots in place of their numbers, for the ids of a block of rows.
// E: experts of a layer; K: experts a token.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "r3/lookup.hpp"
#include "r3/pack.hpp"
#include "r3/text.hpp"

namespace r3 {

// The slots of the experts of some layers; empty where experts lie in their order.
template <class Id>
class SlotTables {
 public:
  SlotTables() = default;

  // slot_of: [layers, E]; each layer's is a permutation.
  SlotTables(std::span<std::int32_t const> slot_of, std::size_t num_experts)
      : size_(sizeof(Id) == 1 ? kByteTable : std::bit_ceil(num_experts)) {
    slots_.assign(slot_of.size() / num_experts * size_, 0);
    for (std::size_t layer = 0; layer * size_ < slots_.size(); ++layer) {
      std::vector<bool> taken(num_experts);
      for (std::size_t expert = 0; expert < num_experts; ++expert) {
        std::int32_t const slot = slot_of[layer * num_experts + expert];
        bool const inside = slot >= 0 && static_cast<std::size_t>(slot) < num_experts;
        if (!inside || taken[static_cast<std::size_t>(slot)]) {
          refuse("slot_of: slot (", slot, ") of expert ", expert, " in local layer ", layer, " is ",
                 inside ? "another's too" : "outside 0 to ", inside ? "" : std::to_string(num_experts - 1));
        }
        taken[static_cast<std::size_t>(slot)] = true;
        slots_[layer * size_ + expert] = static_cast<Id>(slot);
      }
    }
  }

  bool empty() const { return slots_.empty(); }

  // An id that is no expert has a slot too, and leads out of no table.
  Id slot(std::size_t layer, Id expert) const { return slots_[layer * size_ + (expert & (size_ - 1))]; }

  Id const* table(std::size_t layer) const { return slots_.data() + layer * size_; }

  // Puts slots in the place of ids that lie in the cache. ids: [room(count)].
  void look_up(std::size_t layer, Id* ids, std::size_t count) const {
    if constexpr (sizeof(Id) == 1) {
      look_up_(ids, room(count), table(layer));
    } else {
      std::transform(ids, ids + count, ids, [&](Id id) { return slot(layer, id); });
    }
  }

  // Room for so many ids, as look_up wants it.
  static std::size_t room(std::size_t count) { return (count + kLookUpBytes - 1) / kLookUpBytes * kLookUpBytes; }

 private:
  std::size_t size_ = 0;  // of a layer's table
  LookUp look_up_ = find_look_up();
  std::vector<Id> slots_;  // [layers, size]
};

// Packs a layer of a block of rows as slots.
template <class Id, class Out>
class SlotPack {
 public:
  // A block has at most so many rows.
  SlotPack(std::size_t topk, std::size_t rows)
      : topk_(topk), raw_(SlotTables<Id>::room(rows * topk)), to_raw_(find_pack<Id, Id>(topk, false, nullptr)) {}

  void operator()(SlotTables<Id> const& tables, std::size_t layer, std::span<Id const* const> rows, std::size_t offset,
                  bool stream, Out* out, Largest<Id>& largest) {
    if constexpr (sizeof(Id) == 1) {
      auto const pack = find_slot_pack<Out>(topk_, stream, out);
      if (pack != nullptr && rows.size() * topk_ % kLookUpBytes == 0) {
        return pack(rows.data(), rows.size(), offset, tables.table(layer), out, largest);
      }
    }
    std::size_t const count = rows.size() * topk_;
    to_raw_(rows.data(), rows.size(), offset, topk_, raw_.data(), largest);
    tables.look_up(layer, raw_.data(), count);
    widen(raw_.data(), count, stream, out);
  }

 private:
  std::size_t topk_;
  std::vector<Id> raw_;
  Pack<Id, Id> to_raw_;
};

}  // namespace r3
