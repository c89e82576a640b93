// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mpi.h>

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

}  // namespace mics::test
