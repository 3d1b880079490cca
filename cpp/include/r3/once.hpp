#pragma once

namespace r3 {

// Reads a number that somebody else may be writing: what is checked is what is used, as the compiler must not read it
// again.
template <class Number>
Number read_once(Number const& number) {
  return __atomic_load_n(&number, __ATOMIC_RELAXED);
}

}  // namespace r3
