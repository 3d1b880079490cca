// From the shards of several ranks to the traces of samples: the inverse of repack.
// S: tokens of a sample; M: MoE layers; K: experts a token; E: experts of a layer; T: local rows of a shard.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>
#include <variant>
#include <vector>

#include "r3/parallel.hpp"
#include "r3/segments.hpp"
#include "r3/text.hpp"
#include "r3/topk.hpp"

namespace r3 {

using AnyIds = std::variant<std::uint8_t const*, std::uint16_t const*, std::int16_t const*, std::int32_t const*,
                            std::int64_t const*>;

// The versions decide which rows are copied, so they must not change while a job runs; ids may.
struct Shard {
  AnyIds ids;                                   // [M_shard, T, K]
  std::span<std::int32_t const> row_versions;   // [T]; >= 0, kLive or kPadding
  std::span<std::int64_t const> layer_indices;  // [M_shard], into M
  std::span<Segment const> segments;
};

template <class Id>
struct Sample {
  Id* ids;                           // [S, M, K]
  std::span<std::int32_t> versions;  // [S]
};

template <class Id>
struct CollectJob {
  std::vector<Shard> shards;
  std::vector<Sample<Id>> samples;
  std::span<std::int32_t const> layer_ids;  // [M], to name a layer
  std::size_t topk;                         // K
  std::size_t num_experts;                  // E
  std::size_t num_threads;                  // at least 1
};

// Remembers which (token, layer) of which sample was written, and which version its token has.
template <class Id>
class Coverage {
 public:
  explicit Coverage(CollectJob<Id> const& job) : job_(job) {
    for (auto const& sample : job.samples) {
      written_.emplace_back(sample.versions.size() * job.layer_ids.size());
      known_.emplace_back(sample.versions.size());
    }
  }

  void add(Shard const& shard, std::size_t number, std::vector<Place> const& places) {
    for (std::size_t row = 0; row < places.size(); ++row) {
      auto const [sample, pos] = places[row];
      std::int32_t const version = shard.row_versions[row];
      bool const padding = pos >= job_.samples[sample].versions.size();
      if (version < kPadding || padding != (version == kPadding)) {
        refuse("row_versions[", row, "] (", version, ") of shard ", number, " is wrong: sample ", sample, ", token ",
               pos, padding ? " is padding" : " is not padding", " (", kPadding, ")");
      }
      if (!padding) {
        set_version(number, sample, pos, version);
        mark(shard, number, sample, pos);
      }
    }
  }

  void check_complete() const {
    for (std::size_t sample = 0; sample < written_.size(); ++sample) {
      auto const gap = std::find(written_[sample].begin(), written_[sample].end(), 0);
      if (gap != written_[sample].end()) {
        auto const cell = static_cast<std::size_t>(gap - written_[sample].begin());
        refuse("no shard holds sample ", sample, ", token ", cell / job_.layer_ids.size(), ", layer ",
               job_.layer_ids[cell % job_.layer_ids.size()]);
      }
    }
  }

 private:
  void set_version(std::size_t number, std::size_t sample, std::size_t pos, std::int32_t version) {
    std::int32_t& known = job_.samples[sample].versions[pos];
    if (known_[sample][pos] != 0 && known != version) {
      refuse("version (", version, ") of sample ", sample, ", token ", pos, " in shard ", number, " != ", known,
             " in an earlier one");
    }
    known = version;
    known_[sample][pos] = 1;
  }

  void mark(Shard const& shard, std::size_t number, std::size_t sample, std::size_t pos) {
    auto* written = written_[sample].data() + pos * job_.layer_ids.size();
    for (std::int64_t layer : shard.layer_indices) {
      auto& cell = written[static_cast<std::size_t>(layer)];
      if (cell != 0) {
        refuse("sample ", sample, ", token ", pos, ", layer ", job_.layer_ids[static_cast<std::size_t>(layer)],
               " is held twice, the second time by shard ", number);
      }
      cell = 1;
    }
  }

  CollectJob<Id> const& job_;
  std::vector<std::vector<std::uint8_t>> written_;  // [S, M] of each sample
  std::vector<std::vector<std::uint8_t>> known_;    // [S] of each sample
};

// Copies rows of ids that lie side by side to where they belong; a live row becomes 0, padding is left out.
// K is 0 where it is known at run time only.
template <class Id, std::size_t K>
void scatter_rows(Id const* ids, std::span<std::int32_t const> versions, std::span<Id* const> rows, std::size_t step,
                  std::size_t topk) {
  std::size_t const k = K == 0 ? topk : K;
  for (std::size_t row = 0; row < rows.size(); ++row, ids += k) {
    if (versions[row] >= 0) {
      std::memcpy(rows[row] + step, ids, k * sizeof(Id));
    } else if (versions[row] == kLive) {
      std::fill_n(rows[row] + step, k, Id{0});
    }
  }
}

// Copies the rows of a shard in blocks, layer after layer, so that a block's tokens stay in the cache.
template <class Id, class In>
class ShardCopier {
 public:
  ShardCopier(CollectJob<Id> const& job, Shard const& shard, In const* ids, std::vector<Place> const& places)
      : job_(job), shard_(shard), ids_(ids), places_(places) {
    scatter_ = with_topk(job.topk, []<std::size_t K>() { return &scatter_rows<Id, K>; });
  }

  void operator()(std::size_t begin, std::size_t end) const {
    constexpr std::size_t kBlock = 64;
    std::vector<Id> ids(kBlock * job_.topk);
    std::vector<Id*> rows;
    for (std::size_t first = begin; first < end; first += kBlock) {
      std::size_t const last = std::min(end, first + kBlock);
      rows.clear();
      for (std::size_t row = first; row < last; ++row) {
        bool const padding = shard_.row_versions[row] == kPadding;
        rows.push_back(padding ? nullptr : job_.samples[places_[row].sample].ids + places_[row].pos * token_size());
      }
      copy_block(first, rows, ids);
    }
  }

 private:
  std::size_t token_size() const { return job_.layer_ids.size() * job_.topk; }

  // As an unsigned number a negative id is too large.
  bool is_wrong(In id) const { return static_cast<std::make_unsigned_t<In>>(id) >= job_.num_experts; }

  void copy_block(std::size_t first, std::span<Id* const> rows, std::span<Id> ids) const {
    auto const versions = shard_.row_versions.subspan(first, rows.size());
    for (std::size_t m = 0; m < shard_.layer_indices.size(); ++m) {
      auto const layer = static_cast<std::size_t>(shard_.layer_indices[m]);
      In const* in = ids_ + (m * places_.size() + first) * job_.topk;
      bool wrong = false;
      for (std::size_t i = 0; i < rows.size() * job_.topk; ++i) {
        In const id = in[i];  // read once: what is written is what was looked at
        wrong |= is_wrong(id);
        ids[i] = static_cast<Id>(id);
      }
      if (wrong) {
        check_replayed(first, versions, in, layer);
      }
      scatter_(ids.data(), versions, rows, layer * job_.topk, job_.topk);
    }
  }

  // Live and padding rows may hold anything.
  void check_replayed(std::size_t first, std::span<std::int32_t const> versions, In const* in,
                      std::size_t layer) const {
    for (std::size_t i = 0; i < versions.size() * job_.topk; ++i) {
      if (versions[i / job_.topk] >= 0 && is_wrong(in[i])) {
        auto const [sample, pos] = places_[first + i / job_.topk];
        refuse("id (", +in[i], ") of sample ", sample, ", token ", pos, ", layer ", job_.layer_ids[layer],
               " is outside 0 to num_experts (", job_.num_experts, ") - 1");
      }
    }
  }

  CollectJob<Id> const& job_;
  Shard const& shard_;
  In const* ids_;
  std::vector<Place> const& places_;
  void (*scatter_)(Id const*, std::span<std::int32_t const>, std::span<Id* const>, std::size_t, std::size_t);
};

// Fills the samples of the job; refuses a (sample, token, layer) that no shard or more than one holds. That a row's ids
// are distinct is left to who makes the trace.
template <class Id>
void collect(CollectJob<Id> const& job) {
  Coverage<Id> coverage(job);
  std::vector<std::vector<Place>> places;
  for (std::size_t number = 0; number < job.shards.size(); ++number) {
    Shard const& shard = job.shards[number];
    for (std::int64_t layer : shard.layer_indices) {
      if (layer < 0 || layer >= static_cast<std::int64_t>(job.layer_ids.size())) {
        refuse("layer index (", layer, ") of shard ", number, " outside the ", job.layer_ids.size(), " layers");
      }
    }
    places.push_back(places_of_rows(shard.segments, job.samples.size(), shard.row_versions.size()));
    coverage.add(shard, number, places.back());
  }
  coverage.check_complete();
  // Each cell is in exactly one shard now, so workers write to disjoint places.
  for (std::size_t number = 0; number < job.shards.size(); ++number) {
    Shard const& shard = job.shards[number];
    std::visit(
        [&]<class In>(In const* ids) {
          ShardCopier<Id, In> const copy(job, shard, ids, places[number]);
          in_parallel(places[number].size(), job.num_threads,
                      [&](std::size_t begin, std::size_t end, std::size_t) { copy(begin, end); });
        },
        shard.ids);
  }
}

}  // namespace r3
