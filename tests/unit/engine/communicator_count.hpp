// SPDX-License-Identifier: Apache-2.0
// Counts the communicators that a program holds, by MPI's profiling interface: these take the place
// of the library's own functions. One source of a program may include it.
#pragma once

#include <mpi.h>

#include <atomic>

namespace mics::test {

inline std::atomic<int> communicators{0};

}  // namespace mics::test

extern "C" {
int MPI_Comm_dup(MPI_Comm comm, MPI_Comm* copy) {
  const int status = PMPI_Comm_dup(comm, copy);
  if (*copy != MPI_COMM_NULL) ++mics::test::communicators;
  return status;
}
int MPI_Comm_split(MPI_Comm comm, int color, int key, MPI_Comm* part) {
  const int status = PMPI_Comm_split(comm, color, key, part);
  if (*part != MPI_COMM_NULL) ++mics::test::communicators;
  return status;
}
int MPI_Comm_split_type(MPI_Comm comm, int type, int key, MPI_Info info, MPI_Comm* part) {
  const int status = PMPI_Comm_split_type(comm, type, key, info, part);
  if (*part != MPI_COMM_NULL) ++mics::test::communicators;
  return status;
}
int MPI_Comm_create_group(MPI_Comm comm, MPI_Group group, int tag, MPI_Comm* part) {
  const int status = PMPI_Comm_create_group(comm, group, tag, part);
  if (*part != MPI_COMM_NULL) ++mics::test::communicators;
  return status;
}
int MPI_Comm_free(MPI_Comm* comm) {
  --mics::test::communicators;
  return PMPI_Comm_free(comm);
}
}
