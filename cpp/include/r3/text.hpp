#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace r3 {

// Joins operands and words to the text of an error.
template <class... Parts>
std::string text(Parts const&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

// Raises std::invalid_argument, which Python sees as ValueError.
template <class... Parts>
[[noreturn]] void refuse(Parts const&... parts) {
  throw std::invalid_argument(text(parts...));
}

}  // namespace r3
