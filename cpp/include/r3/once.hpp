#pragma once

namespace r3 {

// Reads a number that another thread may be writing exactly once, so that the value that is checked is the one that is
// used: the compiler must not read it again.
template <class Number>
Number read_once(Number const& number) {
  return __atomic_load_n(&number, __ATOMIC_RELAXED);
}

}  // namespace r3
