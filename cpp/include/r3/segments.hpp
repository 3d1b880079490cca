// Which token of which sample lies at which local row.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "r3/text.hpp"

namespace r3 {

// What the version of a local row says where the row holds no route.
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
