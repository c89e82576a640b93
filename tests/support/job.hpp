// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mpi.h>

#include <cstdlib>

namespace mics::test {

/// This process among all of the launch.
[[nodiscard]] inline int job_rank() {
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

/// Processes of the launch.
[[nodiscard]] inline int job_size() {
  int size = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

/// One of how many cases runs: MICS_TEST_SAMPLE, by default all.
[[nodiscard]] inline int sample_stride() {
  const char* const text = std::getenv("MICS_TEST_SAMPLE");
  return text == nullptr ? 1 : std::atoi(text);
}
/// True for one of that many calls: where an engine takes seconds to make, tests of hundreds of
/// cases run a sample of them. The same on all ranks that make the same calls.
[[nodiscard]] inline bool in_sample() {
  static int calls = 0;
  return calls++ % sample_stride() == 0;
}

}  // namespace mics::test
