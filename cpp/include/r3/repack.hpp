// From the traces of a micro-batch to what a rank's MoE layers need.
// S: tokens of a sample; M: MoE layers of a trace; K: experts a token; E: experts of a layer; T: local rows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "r3/padding.hpp"
#include "r3/parallel.hpp"
#include "r3/segments.hpp"
#include "r3/text.hpp"
#include "r3/topk.hpp"

namespace r3 {

template <class Id>
struct Trace {
  Id const* ids;                  // [S, M, K]
  std::int32_t const* versions;   // [S]; below 0: not captured
  std::int32_t const* token_ids;  // [S], or null
  std::size_t num_tokens;         // S
};

template <class Id, class Out>
struct RepackJob {
  std::vector<Trace<Id>> traces;
  std::span<Segment const> segments;
  std::span<std::int64_t const> layer_indices;  // [M_local], into M
  std::size_t num_layers;                       // M
  std::size_t topk;                             // K
  std::size_t num_experts;                      // E
  std::size_t ep_size;
  std::size_t num_rows;                 // T
  std::size_t num_threads;              // at least 1
  Out* out;                             // [M_local, T, K]
  std::int32_t* row_versions;           // [T]
  std::int64_t* counts;                 // [M_local, E], or null
  std::int64_t const* expected_tokens;  // [T], or null
};

// Where a local row's ids of layer m begin: at ids + step * m. Padding is the same in every layer.
template <class Id>
struct Row {
  Id const* ids;
  std::size_t step;
};

// All bits set means a live row, so an unsigned type has one id less to give away.
template <class Out>
void check_out_holds(std::size_t num_experts) {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<Out>::max()) - (std::is_signed_v<Out> ? 0 : 1);
  if (num_experts - 1 > kMost) {
    refuse("num_experts (", num_experts, ") > ", kMost + 1, ", the most that ", std::is_signed_v<Out> ? "int" : "uint",
           8 * sizeof(Out), " can hold beside the mark of a live row");
  }
}

template <class Id, class Out>
void check_tokens(RepackJob<Id, Out> const& job, std::vector<Place> const& places) {
  for (std::size_t row = 0; row < job.num_rows; ++row) {
    auto const [sample, pos] = places[row];
    Trace<Id> const& trace = job.traces[sample];
    if (pos < trace.num_tokens && trace.token_ids[pos] != job.expected_tokens[row]) {
      refuse("token (", trace.token_ids[pos], ") of the trace of sample ", sample, " at position ", pos,
             " != ", job.expected_tokens[row], " of the micro-batch at local row ", row);
    }
  }
}

// Finds the source of each row and says in row_versions what it is. The n-th padding row takes the walk's n-th K ids.
template <class Id, class Out>
std::vector<Row<Id>> find_rows(RepackJob<Id, Out> const& job, std::vector<Place> const& places,
                               std::vector<Id> const& walk) {
  std::vector<Row<Id>> rows(job.num_rows);
  std::size_t at = 0;
  for (std::size_t row = 0; row < job.num_rows; ++row) {
    auto const [sample, pos] = places[row];
    Trace<Id> const& trace = job.traces[sample];
    if (pos >= trace.num_tokens) {
      job.row_versions[row] = kPadding;
      rows[row] = {walk.data() + at, 0};
      at = (at + job.topk) % job.num_experts;
    } else if (trace.versions[pos] < 0) {
      job.row_versions[row] = kLive;
      rows[row] = {walk.data(), 0};
    } else {
      job.row_versions[row] = trace.versions[pos];
      rows[row] = {trace.ids + pos * job.num_layers * job.topk, job.topk};
    }
  }
  return rows;
}

// Copies the ids of some rows in one layer side by side. K is 0 where it is known at run time only.
template <class Id, std::size_t K>
void gather_rows(std::span<Row<Id> const> rows, std::size_t layer, std::size_t topk, Id* out) {
  std::size_t const k = K == 0 ? topk : K;
  for (Row<Id> const& row : rows) {
    std::memcpy(out, row.ids + row.step * layer, k * sizeof(Id));
    out += k;
  }
}

// One pass over the rows begin to end, in blocks: a token's ids of all layers lie together in a trace and far apart in
// the output, so a block's tokens stay in the cache while layer after layer is gathered, checked, counted and widened.
template <class Id, class Out>
class RowCopier {
 public:
  RowCopier(RepackJob<Id, Out> const& job, std::vector<Place> const& places, std::span<Row<Id> const> rows)
      : job_(job), places_(places), rows_(rows), block_(block_rows(job)) {
    gather_ = with_topk(job.topk, []<std::size_t K>() { return &gather_rows<Id, K>; });
  }

  void operator()(std::size_t begin, std::size_t end, std::int64_t* counts) const {
    std::vector<Id> ids(block_ * job_.topk);
    for (std::size_t first = begin; first < end; first += block_) {
      copy_block(first, std::min(end, first + block_), ids, counts);
    }
  }

 private:
  static std::size_t block_rows(RepackJob<Id, Out> const& job) {
    constexpr std::size_t kCacheBytes = std::size_t{1} << 15;
    return std::clamp<std::size_t>(kCacheBytes / (job.num_layers * job.topk * sizeof(Id)), 16, 512);
  }

  void copy_block(std::size_t first, std::size_t last, std::span<Id> buffer, std::int64_t* counts) const {
    auto const ids = buffer.first((last - first) * job_.topk);
    auto const versions = std::span(job_.row_versions, job_.num_rows).subspan(first, last - first);
    bool const any_live = std::ranges::find(versions, kLive) != versions.end();
    for (std::size_t m = 0; m < job_.layer_indices.size(); ++m) {
      auto const layer = static_cast<std::size_t>(job_.layer_indices[m]);
      gather_(rows_.subspan(first, last - first), layer, job_.topk, ids.data());
      Id largest = 0;
      for (Id id : ids) {
        largest = std::max(largest, id);
      }
      if (largest >= job_.num_experts) {
        refuse_id(first, ids, layer);
      }
      if (counts != nullptr) {
        count(versions, ids.data(), counts + m * job_.num_experts);
      }
      Out* out = job_.out + (m * job_.num_rows + first) * job_.topk;
      for (std::size_t i = 0; i < ids.size(); ++i) {
        out[i] = static_cast<Out>(ids[i]);
      }
      if (any_live) {
        mark_live(versions, out);
      }
    }
  }

  void count(std::span<std::int32_t const> versions, Id const* ids, std::int64_t* counts) const {
    for (std::int32_t version : versions) {
      for (std::size_t i = 0; version != kLive && i < job_.topk; ++i) {
        ++counts[ids[i]];
      }
      ids += job_.topk;
    }
  }

  void mark_live(std::span<std::int32_t const> versions, Out* out) const {
    for (std::int32_t version : versions) {
      if (version == kLive) {
        std::fill_n(out, job_.topk, static_cast<Out>(-1));
      }
      out += job_.topk;
    }
  }

  [[noreturn]] void refuse_id(std::size_t first, std::span<Id const> ids, std::size_t layer) const {
    auto const bad = std::ranges::find_if(ids, [&](Id id) { return id >= job_.num_experts; });
    auto const [sample, pos] = places_[first + static_cast<std::size_t>(bad - ids.begin()) / job_.topk];
    refuse("id (", unsigned{*bad}, ") >= num_experts (", job_.num_experts, ") in the trace of sample ", sample,
           " at position ", pos, ", layer index ", layer);
  }

  RepackJob<Id, Out> const& job_;
  std::vector<Place> const& places_;
  std::span<Row<Id> const> rows_;
  std::size_t block_;
  void (*gather_)(std::span<Row<Id> const>, std::size_t, std::size_t, Id*);
};

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
  auto const places = places_of_rows(job.segments, job.traces.size(), job.num_rows);
  if (job.expected_tokens != nullptr) {
    check_tokens(job, places);
  }
  auto const rows = find_rows(job, places, walk);
  std::size_t const num_counts = job.counts == nullptr ? 0 : job.layer_indices.size() * job.num_experts;
  std::vector<std::vector<std::int64_t>> counts(job.num_threads, std::vector<std::int64_t>(num_counts));
  RowCopier<Id, Out> const copy(job, places, rows);
  in_parallel(job.num_rows, job.num_threads, [&](std::size_t begin, std::size_t end, std::size_t worker) {
    copy(begin, end, job.counts == nullptr ? nullptr : counts[worker].data());
  });
  for (std::size_t i = 0; i < num_counts; ++i) {
    job.counts[i] = 0;
    for (auto const& part : counts) {
      job.counts[i] += part[i];
    }
  }
}

}  // namespace r3
