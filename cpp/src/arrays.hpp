// Checked views of numpy arrays: nothing is converted, and what does not fit is refused with its name and both
// operands.
#pragma once

#include <pybind11/numpy.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <ostream>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "r3/segments.hpp"
#include "r3/text.hpp"

namespace r3 {

// What an array is called in an error: as text only when there is one, because to make text of the names of hundreds of
// traces takes a seventh of the time in which a rank's routes are packed.
struct Name {
  static constexpr std::size_t kNoIndex = std::numeric_limits<std::size_t>::max();

  Name(char const* array, std::size_t index = kNoIndex, char const* part = "")
      : array(array), index(index), part(part) {}

  friend std::ostream& operator<<(std::ostream& stream, Name const& name) {
    stream << name.array;
    if (name.index != kNoIndex) {
      stream << '[' << name.index << ']';
    }
    return stream << name.part;
  }

  char const* array;
  std::size_t index;
  char const* part;
};

// Pointer and shape of an array; it keeps the array alive, so make and drop it with the GIL held.
template <class T, std::size_t Rank>
struct View {
  T* data;
  std::array<std::size_t, Rank> shape;
  pybind11::array owner;

  std::span<T> span() const { return {data, shape[0]}; }
};

template <class T>
bool has_dtype(pybind11::array const& array) {
  return pybind11::isinstance<pybind11::array_t<std::remove_const_t<T>, 0>>(array);
}

// Views an array of exactly this dtype; a const T asks for reading only.
template <class T, std::size_t Rank>
View<T, Rank> view(pybind11::handle object, Name const& name) {
  if (!pybind11::isinstance<pybind11::array>(object)) {
    refuse(name, ": ", pybind11::type::of(object).attr("__name__").cast<std::string>(), " is not a numpy array");
  }
  auto array = pybind11::reinterpret_borrow<pybind11::array>(object);
  if (!has_dtype<T>(array)) {
    refuse(name, ": dtype ", pybind11::str(array.dtype()).cast<std::string>(),
           " != ", pybind11::str(pybind11::dtype::of<std::remove_const_t<T>>()).cast<std::string>());
  }
  if (array.ndim() != static_cast<pybind11::ssize_t>(Rank)) {
    refuse(name, ": ", array.ndim(), " dimensions != ", Rank);
  }
  constexpr int kAligned = pybind11::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & pybind11::array::c_style) == 0 || (array.flags() & kAligned) == 0) {
    refuse(name, ": not C-contiguous and aligned");
  }
  if (!std::is_const_v<T> && !array.writeable()) {
    refuse(name, ": read-only, but it is to be written");
  }
  View<T, Rank> result{static_cast<T*>(const_cast<void*>(array.data())), {}, array};
  for (std::size_t i = 0; i < Rank; ++i) {
    result.shape[i] = static_cast<std::size_t>(array.shape(static_cast<pybind11::ssize_t>(i)));
  }
  return result;
}

inline void check_length(Name const& name, std::size_t found, Name const& other, std::size_t wanted) {
  if (found != wanted) {
    refuse(name, ": length ", found, " != ", wanted, " of ", other);
  }
}

// Refuses E outside of what an id of this type can name, and K outside 1 to E.
template <class Id>
void check_experts(std::int64_t num_experts, std::size_t topk) {
  constexpr std::int64_t kMost = std::int64_t{1} << std::numeric_limits<Id>::digits;
  if (num_experts < 1 || num_experts > kMost) {
    refuse("num_experts (", num_experts, ") outside 1 to ", kMost, " of ids of ", sizeof(Id), " bytes");
  }
  if (topk < 1 || topk > static_cast<std::size_t>(num_experts)) {
    refuse("topk (", topk, ") outside 1 to num_experts (", num_experts, ")");
  }
}

// Calls action.operator()<Id>() with the type of a trace's ids.
template <class Action>
auto with_trace_dtype(pybind11::array const& array, Name const& name, Action action) {
  if (has_dtype<std::uint8_t>(array)) {
    return action.template operator()<std::uint8_t>();
  }
  if (has_dtype<std::uint16_t>(array)) {
    return action.template operator()<std::uint16_t>();
  }
  refuse(name, ": dtype ", pybind11::str(array.dtype()).cast<std::string>(), " is neither uint8 nor uint16");
}

// Calls action.operator()<T>() with the type of the ids that a trainer uses.
template <class Action>
auto with_local_dtype(pybind11::array const& array, Name const& name, Action action) {
  if (has_dtype<std::int16_t>(array)) {
    return action.template operator()<std::int16_t>();
  }
  if (has_dtype<std::int32_t>(array)) {
    return action.template operator()<std::int32_t>();
  }
  if (has_dtype<std::int64_t>(array)) {
    return action.template operator()<std::int64_t>();
  }
  if (has_dtype<std::uint8_t>(array)) {
    return action.template operator()<std::uint8_t>();
  }
  if (has_dtype<std::uint16_t>(array)) {
    return action.template operator()<std::uint16_t>();
  }
  refuse(name, ": dtype ", pybind11::str(array.dtype()).cast<std::string>(),
         " is none of uint8, uint16, int16, int32, int64");
}

// Views [N, 5] int64 as segments.
inline View<Segment const, 1> view_segments(pybind11::handle object, Name const& name) {
  static_assert(sizeof(Segment) == 5 * sizeof(std::int64_t) && std::is_standard_layout_v<Segment>);
  auto table = view<std::int64_t const, 2>(object, name);
  check_length(name, table.shape[1], "sample, pos, length, row, stride", 5);
  return {reinterpret_cast<Segment const*>(table.data), {table.shape[0]}, table.owner};
}

// Copies what decides where is read and written: the array itself may change while the GIL is released.
template <class T>
std::vector<std::remove_const_t<T>> copy_of(View<T, 1> const& view) {
  return {view.data, view.data + view.shape[0]};
}

inline std::size_t check_num_threads(std::int64_t num_threads) {
  constexpr std::int64_t kMost = 1024;
  if (num_threads < 1 || num_threads > kMost) {
    refuse("num_threads (", num_threads, ") outside 1 to ", kMost);
  }
  return static_cast<std::size_t>(num_threads);
}

}  // namespace r3
