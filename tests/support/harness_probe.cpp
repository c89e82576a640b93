// SPDX-License-Identifier: Apache-2.0
// Tests that fail, hang and skip on purpose. harness_test.py runs them one at a time and checks
// what the harness makes of them; nothing else runs this program.
#include "sub_communicator.hpp"
#include <support/job.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <stdexcept>

namespace {

using mics::test::job_rank;
using mics::test::job_size;

TEST(HarnessProbe, Passes) { EXPECT_GE(job_rank(), 0); }

TEST(HarnessProbe, FailsOnRankOne) { EXPECT_NE(job_rank(), 1) << "as intended"; }

TEST(HarnessProbe, ThrowsOnRankOne) {
  if (job_rank() == 1) throw std::runtime_error("as intended");
}

TEST(HarnessProbe, HangsOnRankOne) {
  // Rank 1 waits for a message that nobody sends, the others for rank 1.
  int message = 0;
  if (job_rank() == 1) MPI_Recv(&message, 1, MPI_INT, 0, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
}

TEST(HarnessProbe, Skips) { GTEST_SKIP() << "as intended"; }

TEST(HarnessProbe, SeesEveryWorldSize) {
  int calls = 0;
  mics::test::for_each_world_size(job_size() + 1, [&](MPI_Comm comm) {
    ++calls;
    int size = 0;
    MPI_Comm_size(comm, &size);

    int sum = 1;
    MPI_Allreduce(MPI_IN_PLACE, &sum, 1, MPI_INT, MPI_SUM, comm);

    EXPECT_EQ(sum, size);
  });
  EXPECT_EQ(calls, job_size() - job_rank());  // rank r is in the sizes r + 1 ... job_size
}

}  // namespace
