// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <support/job.hpp>

#include <mpi.h>

namespace mics::test {

/// The first `size` ranks of the job, or null on the others.
class FirstRanks {
 public:
  explicit FirstRanks(int size) {
    MPI_Comm_split(MPI_COMM_WORLD, job_rank() < size ? 0 : MPI_UNDEFINED, job_rank(), &comm_);
  }
  ~FirstRanks() {
    if (comm_ != MPI_COMM_NULL) MPI_Comm_free(&comm_);
  }
  FirstRanks(const FirstRanks&) = delete;
  FirstRanks& operator=(const FirstRanks&) = delete;
  [[nodiscard]] MPI_Comm comm() const { return comm_; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

}  // namespace mics::test
