// SPDX-License-Identifier: Apache-2.0
// main() of every test program: MPI, Kokkos and GoogleTest on any number of ranks, one included.
#include "rank_listener.hpp"
#include "watchdog.hpp"

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdio>

namespace {

using namespace mics::test;

// Runs the tests; returns the same status on all ranks.
int run(int rank) {
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (rank != 0) {
    delete listeners.Release(listeners.default_result_printer());
    delete listeners.Release(listeners.default_xml_generator());
  }
  RankListener ranks(MPI_COMM_WORLD);
  Watchdog watchdog(rank);
  // Ends come in reverse order: the ranks agree while the watchdog still watches.
  listeners.Append(&watchdog);
  listeners.Append(&ranks);

  int status = RUN_ALL_TESTS();
  MPI_Allreduce(MPI_IN_PLACE, &status, 1, MPI_INT, MPI_MAX, MPI_COMM_WORLD);

  listeners.Release(&ranks);
  listeners.Release(&watchdog);
  // CTest looks for this line (cmake/MicsTest.cmake).
  if (rank == 0 && status == 0 && !ranks.skipped().empty()) {
    std::printf("mics: passed, but skipped %zu test(s):", ranks.skipped().size());
    for (const auto& name : ranks.skipped()) std::printf(" %s", name.c_str());
    std::printf("\n");
  }
  return status;
}

}  // namespace

int main(int argc, char** argv) {
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_MULTIPLE, &provided);
  int rank = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  if (provided < MPI_THREAD_MULTIPLE) {
    if (rank == 0) std::fprintf(stderr, "the tests need MPI_THREAD_MULTIPLE\n");
    MPI_Finalize();
    return 1;
  }
  testing::InitGoogleTest(&argc, argv);
  Kokkos::initialize(argc, argv);

  const int status = run(rank);

  Kokkos::finalize();
  MPI_Finalize();
  return status;
}
