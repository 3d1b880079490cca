// The arguments of repack, and the contents of a chunk of a rank's rows.
// S: tokens of a sample; M: MoE layers of a trace; K: experts a token; E: experts of a layer; T: local rows.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "r3/segments.hpp"
#include "r3/slots.hpp"
#include "r3/text.hpp"

namespace r3 {

template <class Id>
struct Trace {
  Id const* ids;                                   // [S, M, K]
  std::int32_t const* versions;                    // [S]; below 0: not captured
  std::int32_t const* token_ids;                   // [S], or null
  std::size_t num_tokens;                          // S
  std::span<std::int32_t const> version_map = {};  // what to call each version instead; empty: as it is
  bool pad_last = false;                           // the last token's row is a padding row; only with S > 0
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
  std::size_t num_rows;                            // T
  std::size_t num_threads;                         // at least 1
  Out* out;                                        // [M_local, T, K]
  std::int32_t* row_versions;                      // [T]
  std::int64_t* counts;                            // [M_local, E], or null
  std::int64_t const* expected_tokens;             // [T], or null
  std::size_t stream_from = std::size_t{1} << 22;  // bytes of output from which on it is written past the cache
  SlotTables<Id> slots = {};                       // of M_local; empty: ids are written as they are
};

// All bits set means a live row, so an unsigned type can hold one id less.
template <class Out>
void check_out_holds(std::size_t num_experts) {
  constexpr auto kMost = static_cast<std::uint64_t>(std::numeric_limits<Out>::max()) - (std::is_signed_v<Out> ? 0 : 1);
  if (num_experts - 1 > kMost) {
    refuse("num_experts (", num_experts, ") > ", kMost + 1, ", the most that ", std::is_signed_v<Out> ? "int" : "uint",
           8 * sizeof(Out), " can hold beside the mark of a live row");
  }
}

// The part of a chunk of rows that one trace fills: what to read and where to write.
struct Run {
  std::size_t sample;
  std::size_t pos;     // first token
  std::size_t count;   // tokens
  std::size_t row;     // first local row
  std::size_t stride;  // from one local row to the next
};

// Finds what lies in a chunk of rows: where the ids of each row are, which version it has, and whether the micro-batch
// has the same token there. Nothing is kept of rows outside of the chunk. The arrays of the traces may change
// meanwhile: versions are kept as they were read once.
template <class Id, class Out>
class ChunkReader {
 public:
  static constexpr std::size_t kRows = 2048;

  ChunkReader(RepackJob<Id, Out> const& job, std::span<std::size_t const> order, std::vector<Id> const& walk,
              std::size_t begin)
      : job_(job), walk_(walk), segments_(job.segments, order) {
    // The n-th padding row of all takes the walk's n-th K ids.
    std::size_t padding = 0;
    for (Segment const& segment : job.segments) {
      std::int64_t const before = SegmentWalk::tokens_before(segment, static_cast<std::int64_t>(begin));
      padding += static_cast<std::size_t>(std::max<std::int64_t>(0, before - rows_of_trace(segment)));
    }
    padding_at_ = padding % job.num_experts * job.topk % job.num_experts;
  }

  // Where the ids of each row of the chunk first to last begin; a row without a route has its K ids only.
  std::span<Id const* const> read(std::size_t first, std::size_t last) {
    first_ = first;
    std::fill_n(sources_.begin(), last - first, nullptr);
    std::size_t covered = 0;
    bool twice = false, padding = false;
    segments_.chunk(static_cast<std::int64_t>(first), static_cast<std::int64_t>(last), [&](Piece const& piece) {
      Segment const& segment = job_.segments[piece.number];
      std::int64_t const read = std::clamp(rows_of_trace(segment), piece.begin, piece.end);
      twice |= read_run(run_of(segment, piece.begin, read));
      twice |= pad_run(run_of(segment, read, piece.end));
      covered += static_cast<std::size_t>(piece.end - piece.begin);
      padding |= read < piece.end;
    });
    if (twice || covered != last - first) {
      places_of_rows(job_.segments, job_.traces.size(), job_.num_rows);  // says which row it is
    }
    if (job_.expected_tokens != nullptr) {
      check_tokens(first, last);
    }
    if (padding) {
      place_padding(last - first);
    }
    std::copy_n(versions_.begin(), last - first, job_.row_versions + first);
    return {sources_.data(), last - first};
  }

  // The version of each row of the chunk that was read last.
  std::span<std::int32_t const> versions() const { return versions_; }

 private:
  // How many tokens of a segment its trace has, without the trace's last ones that are left out.
  std::int64_t tokens_of_trace(Segment const& segment, std::int64_t left_out = 0) const {
    auto const num_tokens = static_cast<std::int64_t>(job_.traces[static_cast<std::size_t>(segment.sample)].num_tokens);
    std::int64_t const end = num_tokens - left_out;
    return std::clamp<std::int64_t>(end - std::min(end, segment.pos), 0, segment.length);
  }

  // How many rows of a segment are read from its trace; padding follows them.
  std::int64_t rows_of_trace(Segment const& segment) const {
    return tokens_of_trace(segment, job_.traces[static_cast<std::size_t>(segment.sample)].pad_last ? 1 : 0);
  }

  static Run run_of(Segment const& segment, std::int64_t begin, std::int64_t end) {
    return {static_cast<std::size_t>(segment.sample), static_cast<std::size_t>(segment.pos + begin),
            static_cast<std::size_t>(end - begin), static_cast<std::size_t>(segment.row + begin * segment.stride),
            static_cast<std::size_t>(segment.stride)};
  }

  bool read_run(Run const& run) {
    if (run.count == 0) {
      return false;
    }
    return run.stride == 1 ? read_rows<1>(run) : read_rows<0>(run);
  }

  // Returns whether a row was read before. A stride known at compile time lets the compiler use wide registers.
  template <std::size_t kStride>
  bool read_rows(Run const& run) {
    Trace<Id> const& trace = job_.traces[run.sample];
    std::size_t const stride = kStride == 0 ? run.stride : kStride;
    std::size_t const step = job_.num_layers * job_.topk;
    Id const* ids = trace.ids + run.pos * step;
    std::int32_t const* versions = trace.versions + run.pos;
    std::int32_t* row_versions = versions_.data() + (run.row - first_);
    Id const** sources = sources_.data() + (run.row - first_);
    bool twice = false;
    std::int32_t lowest = 0;
    for (std::size_t i = 0; i < run.count; ++i) {
      twice |= sources[i * stride] != nullptr;
      sources[i * stride] = ids + i * step;
      std::int32_t const version = versions[i];
      row_versions[i * stride] = version;
      lowest = std::min(lowest, version);
    }
    if (lowest < 0 || !trace.version_map.empty()) {
      rename_versions(run, trace);
    }
    return twice;
  }

  void rename_versions(Run const& run, Trace<Id> const& trace) {
    for (std::size_t i = 0; i < run.count; ++i) {
      std::size_t const row = run.row + i * run.stride - first_;
      std::int32_t& version = versions_[row];
      if (version < 0) {
        version = kLive;
        sources_[row] = walk_.data();
      } else if (!trace.version_map.empty()) {
        if (static_cast<std::size_t>(version) >= trace.version_map.size()) {
          refuse("version (", version, ") of sample ", run.sample, ", token ", run.pos + i, " is not one of ",
                 trace.version_map.size());
        }
        version = trace.version_map[static_cast<std::size_t>(version)];
      }
    }
  }

  void check_tokens(std::size_t first, std::size_t last) {
    segments_.chunk(static_cast<std::int64_t>(first), static_cast<std::int64_t>(last), [&](Piece const& piece) {
      Segment const& segment = job_.segments[piece.number];
      check_tokens(run_of(segment, piece.begin, std::clamp(tokens_of_trace(segment), piece.begin, piece.end)));
    });
  }

  void check_tokens(Run const& run) const {
    if (run.count == 0) {
      return;
    }
    std::int32_t const* tokens = job_.traces[run.sample].token_ids + run.pos;
    std::int64_t const* expected = job_.expected_tokens + run.row;
    auto differ = [&](std::size_t i) { return std::int64_t{tokens[i]} ^ expected[i * run.stride]; };
    std::int64_t different = 0;
    for (std::size_t i = 0; i < run.count; ++i) {
      different |= differ(i);
    }
    for (std::size_t i = 0; different != 0 && i < run.count; ++i) {
      if (differ(i) != 0) {
        refuse("token (", tokens[i], ") of the trace of sample ", run.sample, " at position ", run.pos + i,
               " != ", expected[i * run.stride], " of the micro-batch at local row ", run.row + i * run.stride);
      }
    }
    if (different != 0) {
      refuse("tokens of the trace of sample ", run.sample, " changed while they were compared");
    }
  }

  bool pad_run(Run const& run) {
    bool twice = false;
    for (std::size_t i = 0; i < run.count; ++i) {
      std::size_t const row = run.row + i * run.stride - first_;
      twice |= sources_[row] != nullptr;
      sources_[row] = walk_.data();
      versions_[row] = kPadding;
    }
    return twice;
  }

  void place_padding(std::size_t num_rows) {
    for (std::size_t i = 0; i < num_rows; ++i) {
      if (versions_[i] == kPadding) {
        sources_[i] = walk_.data() + padding_at_;
        padding_at_ = (padding_at_ + job_.topk) % job_.num_experts;
      }
    }
  }

  RepackJob<Id, Out> const& job_;
  std::vector<Id> const& walk_;
  SegmentWalk segments_;
  std::size_t padding_at_;
  std::size_t first_ = 0;
  std::array<Id const*, kRows> sources_;
  std::array<std::int32_t, kRows> versions_;
};

}  // namespace r3
