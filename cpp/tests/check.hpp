// What a test claims: ends the program with the line and the claim if it is not so.
#pragma once

#include <cstdio>
#include <cstdlib>

inline void check(bool good, char const* what, int line) {
  if (!good) {
    std::fprintf(stderr, "line %d: %s\n", line, what);
    std::exit(1);
  }
}
#define CHECK(what) check((what), #what, __LINE__)
