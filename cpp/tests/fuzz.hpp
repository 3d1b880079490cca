// What the fuzz targets share: numbers and arrays out of a fuzzer's bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "r3/segments.hpp"

// Reads on behind the end as zeros, so that every input means something.
class Input {
 public:
  Input(std::uint8_t const* data, std::size_t size) : rest_(data, size) {}

  template <class Number>
  Number number() {
    Number value{};
    std::size_t const size = std::min(sizeof value, rest_.size());
    if (size > 0) {
      std::memcpy(&value, rest_.data(), size);
    }
    rest_ = rest_.subspan(size);
    return value;
  }

  // A number from 0 to most.
  std::size_t up_to(std::size_t most) { return number<std::uint16_t>() % (most + 1); }

  // Small numbers mostly, and sometimes any.
  std::int64_t wild() {
    auto const kind = number<std::uint8_t>();
    return kind < 240 ? kind % 32 - 2 : number<std::int64_t>();
  }

  template <class Number>
  std::vector<Number> numbers(std::size_t count) {
    std::vector<Number> result(count);
    std::ranges::generate(result, [&] { return number<Number>(); });
    return result;
  }

  std::vector<r3::Segment> segments() {
    std::vector<r3::Segment> result(up_to(6));
    for (auto& segment : result) {
      segment = {wild(), wild(), wild(), wild(), wild()};
    }
    return result;
  }

  std::span<std::uint8_t const> rest() const { return rest_; }

 private:
  std::span<std::uint8_t const> rest_;
};

// A refusal is an answer; whatever else is thrown or read out of bounds ends the run.
template <class Action>
bool accepted(Action action) {
  try {
    action();
    return true;
  } catch (std::invalid_argument const&) {
    return false;
  }
}
