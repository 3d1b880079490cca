// From the traces of a micro-batch to what a rank's MoE layers need.
// M: MoE layers of a trace; K: experts a token; E: experts of a layer; T: local rows.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "r3/chunks.hpp"
#include "r3/pack.hpp"
#include "r3/padding.hpp"
#include "r3/parallel.hpp"
#include "r3/slots.hpp"
#include "r3/stream.hpp"

namespace r3 {

// A rank's layers that lie side by side in a trace: ids begin to end of each of its rows.
struct LayerRun {
  std::size_t begin;
  std::size_t end;
};

inline std::vector<LayerRun> runs_of_layers(std::span<std::int64_t const> layer_indices, std::size_t topk) {
  std::vector<std::int64_t> layers(layer_indices.begin(), layer_indices.end());
  std::ranges::sort(layers);
  std::vector<LayerRun> runs;
  for (std::int64_t layer : layers) {
    std::size_t const begin = static_cast<std::size_t>(layer) * topk;
    if (runs.empty() || runs.back().end < begin) {
      runs.push_back({begin, begin});
    }
    runs.back().end = begin + topk;
  }
  return runs;
}

// Counts that a layer has room for: a power of two, so that no id leads out of them.
inline std::size_t count_slots(std::size_t num_experts) { return std::bit_ceil(num_experts); }

// Packs chunk after chunk in blocks of rows, layer after layer: a token's ids of all layers lie together in a trace and
// far apart in the output, so a block is small enough to stay in the cache until its last layer is packed.
template <class Id, class Out>
class RowCopier {
 public:
  RowCopier(RepackJob<Id, Out> const& job, std::span<std::size_t const> order, std::vector<Id> const& walk)
      : job_(job), order_(order), walk_(walk), runs_(runs_of_layers(job.layer_indices, job.topk)) {
    std::size_t const bytes = job.layer_indices.size() * job.num_rows * job.topk * sizeof(Out);
    stream_ = bytes >= job.stream_from;
    block_ = block_rows<Out>(job.topk);
    stage_pack_ = find_pack<Id, Out>(job.topk, false, nullptr);
    for (std::size_t m = 0; m < job.layer_indices.size(); ++m) {
      packs_.push_back(find_pack<Id, Out>(job.topk, stream_, row_of(m, 0)));
    }
  }

  // Rows at which a worker may begin, so that blocks of several workers do not share lines.
  static constexpr std::size_t kGrain = ChunkReader<Id, Out>::kRows;

  void operator()(std::size_t begin, std::size_t end, std::int64_t* counts) const {
    if (begin >= end) {
      return;
    }
    ChunkReader<Id, Out> reader(job_, order_, walk_, begin);
    std::vector<Out> stage(block_ * job_.topk);
    SlotPack<Id, Out> slots(job_.topk, block_);
    for (std::size_t first = begin; first < end; first += kGrain) {
      std::size_t const last = std::min(end, first + kGrain);
      auto const sources = reader.read(first, last);
      for (std::size_t at = 0; at < sources.size(); at += block_) {
        copy_block(sources, reader.versions(), at, std::min(sources.size(), at + block_), first, stage, slots, counts);
      }
    }
    finish_stores();
  }

 private:
  static constexpr std::size_t kRowsAhead = 64;

  Out* row_of(std::size_t m, std::size_t row) const { return job_.out + (m * job_.num_rows + row) * job_.topk; }

  void copy_block(std::span<Id const* const> sources, std::span<std::int32_t const> all_versions, std::size_t begin,
                  std::size_t end, std::size_t first, std::vector<Out>& stage, SlotPack<Id, Out>& slots,
                  std::int64_t* counts) const {
    std::size_t const count = end - begin;
    auto const versions = all_versions.subspan(begin, count);
    std::array<Id const*, kMostRowsOfBlock> replaced;
    Id const* const* from = &sources[begin];
    bool const mixed = has_row_without_route(versions), placed = !job_.slots.empty();
    if (mixed) {
      from = replace_rows(sources.subspan(begin, count), versions, replaced);
    }
    Largest<Id> largest;
    std::size_t next = 0;
    for (std::size_t m = 0; m < packs_.size(); ++m) {
      std::size_t const offset = offset_of(m);
      Out* out = row_of(m, first + begin);
      if (mixed) {
        if (from != nullptr && placed) {
          slots(job_.slots, m, {from, count}, offset, false, stage.data(), largest);
        } else if (from != nullptr) {
          stage_pack_(from, count, offset, job_.topk, stage.data(), largest);
        }
        copy_mixed(sources.subspan(begin, count), versions, stage.data(), out);
      } else if (placed) {
        slots(job_.slots, m, {from, count}, offset, stream_, out, largest);
      } else {
        packs_[m](from, count, offset, job_.topk, out, largest);
      }
      // Prefetching a little after each layer keeps reads and writes of memory overlapped.
      for (std::size_t const stop = (m + 1) * count / packs_.size(); next < stop; ++next) {
        fetch(sources, begin + next + kRowsAhead);
      }
      if (counts != nullptr && largest.value() < job_.num_experts) {
        count_rows(sources.subspan(begin, count), versions, m, counts + m * count_slots(job_.num_experts));
      }
    }
    if (largest.value() >= job_.num_experts) {
      refuse_ids(sources.subspan(begin, count), versions, first + begin);
    }
  }

  static bool has_row_without_route(std::span<std::int32_t const> versions) {
    std::int32_t lowest = 0;
    for (std::int32_t version : versions) {
      lowest = std::min(lowest, version);
    }
    return lowest < 0;
  }

  // Lets each row without a route read from a row that has one, so that all can be packed alike; returns null if no row
  // has a route.
  static Id const* const* replace_rows(std::span<Id const* const> sources, std::span<std::int32_t const> versions,
                                       std::array<Id const*, kMostRowsOfBlock>& replaced) {
    auto const good = std::ranges::find_if(versions, [](std::int32_t version) { return version >= 0; });
    if (good == versions.end()) {
      return nullptr;
    }
    Id const* const other = sources[static_cast<std::size_t>(good - versions.begin())];
    std::ranges::transform(sources, versions, replaced.begin(),
                           [&](Id const* ids, std::int32_t version) { return version >= 0 ? ids : other; });
    return replaced.data();
  }

  // Writes live and padding rows over what is staged, and copies it to the output.
  void copy_mixed(std::span<Id const* const> sources, std::span<std::int32_t const> versions, Out* stage,
                  Out* out) const {
    Out* row = stage;
    for (std::size_t i = 0; i < versions.size(); ++i, row += job_.topk) {
      if (versions[i] == kLive) {
        std::fill_n(row, job_.topk, static_cast<Out>(-1));
      } else if (versions[i] == kPadding) {
        std::transform(sources[i], sources[i] + job_.topk, row, [](Id id) { return static_cast<Out>(id); });
      }
    }
    std::size_t const size = versions.size() * job_.topk * sizeof(Out);
    if (stream_) {
      stream_bytes(reinterpret_cast<std::byte*>(out), reinterpret_cast<std::byte const*>(stage), size);
    } else {
      std::memcpy(out, stage, size);
    }
  }

  std::size_t offset_of(std::size_t m) const { return static_cast<std::size_t>(job_.layer_indices[m]) * job_.topk; }

  // Prefetches a rank's layers of a row: the hardware prefetcher does not detect reads of a few lines from each row.
  // Behind the chunk, the last token's trace is assumed to go on; a wrong guess costs time only.
  // It must be inlined: the compiler removes a call that changes nothing but the cache.
  [[gnu::always_inline]] void fetch(std::span<Id const* const> sources, std::size_t row) const {
    std::size_t const known = std::min(row, sources.size() - 1);
    std::size_t const step = job_.num_layers * job_.topk * sizeof(Id);
    auto const ids = reinterpret_cast<std::uintptr_t>(sources[known]) + (row - known) * step;
    for (LayerRun const& run : runs_) {
      for (std::size_t at = run.begin * sizeof(Id); at < run.end * sizeof(Id); at += kLine) {
        prefetch(reinterpret_cast<void const*>(ids + at));
      }
    }
  }

  void count_rows(std::span<Id const* const> sources, std::span<std::int32_t const> versions, std::size_t m,
                  std::int64_t* counts) const {
    // Ids were looked at, but may have changed since.
    std::size_t const mask = count_slots(job_.num_experts) - 1, topk = job_.topk;
    for (std::size_t i = 0; i < sources.size(); ++i) {
      if (versions[i] != kLive) {
        Id const* ids = sources[i] + (versions[i] >= 0 ? offset_of(m) : 0);
        // Padding rows are given slots, not experts.
        bool const placed = versions[i] >= 0 && !job_.slots.empty();
        for (std::size_t k = 0; k < topk; ++k) {
          ++counts[(placed ? job_.slots.slot(m, ids[k]) : ids[k]) & mask];
        }
      }
    }
  }

  // Says which of the rows has an id that is too large.
  void refuse_ids(std::span<Id const* const> sources, std::span<std::int32_t const> versions, std::size_t first) const;

  RepackJob<Id, Out> const& job_;
  std::span<std::size_t const> order_;
  std::vector<Id> const& walk_;
  std::vector<LayerRun> runs_;
  std::vector<Pack<Id, Out>> packs_;
  Pack<Id, Out> stage_pack_;
  std::size_t block_;
  bool stream_;
};

template <class Id, class Out>
void RowCopier<Id, Out>::refuse_ids(std::span<Id const* const> sources, std::span<std::int32_t const> versions,
                                    std::size_t first) const {
  for (std::size_t i = 0; i < sources.size(); ++i) {
    for (std::size_t m = 0; versions[i] >= 0 && m < packs_.size(); ++m) {
      auto const ids = std::span(sources[i] + offset_of(m), job_.topk);
      auto const bad = std::ranges::find_if(ids, [&](Id id) { return id >= job_.num_experts; });
      if (bad != ids.end()) {
        auto const place = places_of_rows(job_.segments, job_.traces.size(), job_.num_rows)[first + i];
        refuse("id (", unsigned{*bad}, ") >= num_experts (", job_.num_experts, ") in the trace of sample ",
               place.sample, " at position ", place.pos, ", layer index ", job_.layer_indices[m]);
      }
    }
  }
  refuse("an id >= num_experts (", job_.num_experts, ") changed while it was looked for");
}

template <class Id, class Out>
void check_job(RepackJob<Id, Out> const& job) {
  check_out_holds<Out>(job.num_experts);
  for (std::int64_t layer : job.layer_indices) {
    if (layer < 0 || layer >= static_cast<std::int64_t>(job.num_layers)) {
      refuse("layer index (", layer, ") outside the ", job.num_layers, " layers of the traces");
    }
  }
}

// Fills out, row_versions and counts of the job. Ids at or above E are refused; that a row's ids are distinct is not
// looked at again.
template <class Id, class Out>
void repack(RepackJob<Id, Out> const& job) {
  check_job(job);
  auto const walk = padding_walk<Id>(job.num_experts, job.ep_size, job.topk);
  auto const order = order_by_row(job.segments, job.traces.size(), job.num_rows);
  RowCopier<Id, Out> const copy(job, order, walk);
  std::size_t const num_slots = count_slots(job.num_experts);
  std::size_t const num_counts = job.counts == nullptr ? 0 : job.layer_indices.size() * num_slots;
  std::vector<std::vector<std::int64_t>> counts(job.num_threads, std::vector<std::int64_t>(num_counts));
  constexpr std::size_t kGrain = RowCopier<Id, Out>::kGrain;
  in_parallel((job.num_rows + kGrain - 1) / kGrain, job.num_threads,
              [&](std::size_t begin, std::size_t end, std::size_t worker) {
                copy(begin * kGrain, std::min(end * kGrain, job.num_rows),
                     job.counts == nullptr ? nullptr : counts[worker].data());
              });
  for (std::size_t i = 0; i < num_counts; ++i) {
    std::int64_t sum = 0;
    for (auto const& part : counts) {
      sum += part[i];
    }
    std::size_t const layer = i / num_slots, expert = i % num_slots;
    if (expert < job.num_experts) {
      job.counts[layer * job.num_experts + expert] = sum;
    } else if (sum != 0) {
      refuse("an id >= num_experts (", job.num_experts, ") was written while ids were packed");
    }
  }
}

}  // namespace r3
