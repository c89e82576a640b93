// SPDX-License-Identifier: Apache-2.0
// main() of every test program: MPI, Kokkos and GoogleTest on any number of ranks, one included.
#include "rank_listener.hpp"
#include "watchdog.hpp"
#include <mics/base/device.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdio>
#include <exception>

namespace {

using namespace mics::test;

// Position of this process among those of its node.
int local_rank() {
  MPI_Comm node = MPI_COMM_NULL;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  int rank = 0;
  MPI_Comm_rank(node, &rank);
  MPI_Comm_free(&node);
  return rank;
}

// Each rank works with a device of its own while there are enough. Kokkos would take the position
// from a variable of the launcher, which not every launcher sets.
void initialize_kokkos(int argc, char** argv) {
  mics::device::require_usable();
  const int devices = Kokkos::num_devices();  // -1 in a build without
  if (devices < 0) {
    Kokkos::initialize(argc, argv);
    return;
  }
  Kokkos::initialize(Kokkos::InitializationSettings().set_device_id(local_rank() % devices));
}

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
  try {
    initialize_kokkos(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "[rank %d] %s\n", rank, error.what());
    MPI_Finalize();
    return 1;
  }

  const int status = run(rank);

  Kokkos::finalize();
  MPI_Finalize();
  return status;
}
