#pragma once

#include <algorithm>
#include <cstddef>
#include <exception>
#include <thread>
#include <vector>

namespace r3 {

// Runs work(begin, end, worker) over equal parts of 0 to count, one part a worker; raises the error of the lowest part.
template <class Work>
void in_parallel(std::size_t count, std::size_t num_workers, Work const& work) {
  std::vector<std::exception_ptr> errors(num_workers);
  auto run = [&](std::size_t worker) noexcept {
    try {
      work(count * worker / num_workers, count * (worker + 1) / num_workers, worker);
    } catch (...) {
      errors[worker] = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> others;
    for (std::size_t worker = 1; worker < num_workers; ++worker) {
      others.emplace_back(run, worker);
    }
    run(0);
  }
  for (auto const& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

}  // namespace r3
