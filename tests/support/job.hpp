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

/// True for one of MICS_TEST_SAMPLE calls (default 1: all): where an engine takes seconds to make,
/// tests of hundreds of cases run a sample of them. The same on all ranks that make the same calls.
[[nodiscard]] inline bool in_sample() {
  static const char* const text = std::getenv("MICS_TEST_SAMPLE");
  static const int stride = text == nullptr ? 1 : std::atoi(text);
  static int calls = 0;
  return calls++ % stride == 0;
}

}  // namespace mics::test
