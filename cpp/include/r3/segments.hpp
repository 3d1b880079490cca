// Which token of which sample lies at which local row.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "r3/text.hpp"

namespace r3 {

// Values of a local row's version where the row holds no route.
inline constexpr std::int32_t kLive = -1;
inline constexpr std::int32_t kPadding = -2;

// The tokens pos to pos + length of a sample are at the local rows row, row + stride, and so on.
struct Segment {
  std::int64_t sample;
  std::int64_t pos;
  std::int64_t length;
  std::int64_t row;
  std::int64_t stride;
};

struct Place {
  std::size_t sample;
  std::size_t pos;
};

inline void check_segment(Segment const& segment, std::size_t number, std::size_t num_samples, std::size_t num_rows) {
  auto const samples = static_cast<std::int64_t>(num_samples);
  auto const rows = static_cast<std::int64_t>(num_rows);
  if (segment.sample < 0 || segment.sample >= samples) {
    refuse("segment ", number, ": sample (", segment.sample, ") outside the ", samples, " samples");
  }
  if (segment.pos < 0 || segment.length < 0 || segment.stride < 1 ||
      segment.pos > std::numeric_limits<std::int64_t>::max() - segment.length) {
    refuse("segment ", number, ": pos (", segment.pos, "), length (", segment.length, ") or stride (", segment.stride,
           ") is too small or too large");
  }
  if (segment.length > 0 &&
      (segment.row < 0 || segment.row >= rows || segment.length - 1 > (rows - 1 - segment.row) / segment.stride)) {
    refuse("segment ", number, ": row (", segment.row, "), length (", segment.length, ") and stride (", segment.stride,
           ") leave the ", rows, " local rows");
  }
}

// The numbers of checked segments, in the order of their first rows.
inline std::vector<std::size_t> order_by_row(std::span<Segment const> segments, std::size_t num_samples,
                                             std::size_t num_rows) {
  std::vector<std::size_t> order;
  for (std::size_t number = 0; number < segments.size(); ++number) {
    check_segment(segments[number], number, num_samples, num_rows);
    if (segments[number].length > 0) {
      order.push_back(number);
    }
  }
  std::ranges::stable_sort(order, {}, [&](std::size_t number) { return segments[number].row; });
  return order;
}

// The tokens begin to end of a segment, counted from its first one.
struct Piece {
  std::size_t number;
  std::int64_t begin;
  std::int64_t end;
};

// Cuts segments at the bounds of chunks of rows; a walk goes through chunks in rising order and keeps only the segments
// that reach into the present one, so that nothing is remembered of each row.
class SegmentWalk {
 public:
  SegmentWalk(std::span<Segment const> segments, std::span<std::size_t const> order)
      : segments_(segments), waiting_(order) {}

  // Calls visit(piece) for what lies in the rows first to last.
  template <class Visit>
  void chunk(std::int64_t first, std::int64_t last, Visit visit) {
    while (!waiting_.empty() && segments_[waiting_.front()].row < last) {
      active_.push_back(waiting_.front());
      waiting_ = waiting_.subspan(1);
    }
    std::erase_if(active_, [&](std::size_t number) {
      Segment const& segment = segments_[number];
      return segment.row + (segment.length - 1) * segment.stride < first;
    });
    for (std::size_t number : active_) {
      std::int64_t const begin = tokens_before(segments_[number], first);
      std::int64_t const end = tokens_before(segments_[number], last);
      if (begin < end) {
        visit(Piece{number, begin, end});
      }
    }
  }

  // How many tokens of a segment lie at rows below this one.
  static std::int64_t tokens_before(Segment const& segment, std::int64_t row) {
    std::int64_t const steps = row <= segment.row ? 0 : (row - 1 - segment.row) / segment.stride + 1;
    return std::min(steps, segment.length);
  }

 private:
  std::span<Segment const> segments_;
  std::span<std::size_t const> waiting_;
  std::vector<std::size_t> active_;
};

// Returns what each local row holds; refuses rows that no segment or more than one segment covers.
inline std::vector<Place> places_of_rows(std::span<Segment const> segments, std::size_t num_samples,
                                         std::size_t num_rows) {
  std::vector<Place> places(num_rows, Place{num_samples, 0});
  for (std::size_t number = 0; number < segments.size(); ++number) {
    Segment const& segment = segments[number];
    check_segment(segment, number, num_samples, num_rows);
    for (std::int64_t i = 0; i < segment.length; ++i) {
      auto const row = static_cast<std::size_t>(segment.row + i * segment.stride);
      if (places[row].sample != num_samples) {
        refuse("local row ", row, " is covered twice, the second time by segment ", number, " at sample ",
               segment.sample, ", token ", segment.pos + i);
      }
      places[row] = {static_cast<std::size_t>(segment.sample), static_cast<std::size_t>(segment.pos + i)};
    }
  }
  for (std::size_t row = 0; row < num_rows; ++row) {
    if (places[row].sample == num_samples) {
      refuse("local row ", row, " of ", num_rows, " is covered by no segment");
    }
  }
  return places;
}

}  // namespace r3
