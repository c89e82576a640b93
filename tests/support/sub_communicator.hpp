// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <support/job.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <string>

namespace mics::test {

/// The first `size` ranks of a communicator as one of their own; MPI_COMM_NULL on the others.
class SubCommunicator {
 public:
  /// Collective over `parent`.
  SubCommunicator(MPI_Comm parent, int size) {
    int rank = 0;
    MPI_Comm_rank(parent, &rank);
    MPI_Comm_split(parent, rank < size ? 0 : MPI_UNDEFINED, rank, &comm_);
  }
  /// Collective over its members.
  ~SubCommunicator() {
    if (comm_ != MPI_COMM_NULL) MPI_Comm_free(&comm_);
  }
  SubCommunicator(const SubCommunicator&) = delete;
  SubCommunicator& operator=(const SubCommunicator&) = delete;

  [[nodiscard]] bool is_member() const noexcept { return comm_ != MPI_COMM_NULL; }
  [[nodiscard]] MPI_Comm native() const noexcept { return comm_; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

/// Calls `body(MPI_Comm)` on the first 1, 2, … ranks of the job, up to `max_size` of them or all.
///
/// Collective over the job. One launch then covers every rank count, and a launch takes longer
/// than most tests. Ranks outside a sub-communicator wait for the next size.
template <class Body>
void for_each_world_size(int max_size, Body&& body) {
  const int ranks = job_size();
  for (int size = 1; size <= std::min(max_size, ranks); ++size) {
    const SubCommunicator comm(MPI_COMM_WORLD, size);
    if (!comm.is_member()) continue;
    SCOPED_TRACE("on " + std::to_string(size) + " of " + std::to_string(ranks) + " ranks");
    body(comm.native());
  }
}

}  // namespace mics::test
