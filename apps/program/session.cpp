// SPDX-License-Identifier: Apache-2.0
#include <Kokkos_Core.hpp>
#include <program/session.hpp>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>

// Weak: the program may be linked with another BLAS.
extern "C" void openblas_set_num_threads(int threads) __attribute__((weak));

namespace mics::apps {

namespace {

// Cores that this rank may use: those it is bound to, or its share of a node that it is not bound
// on.
int cores_of_this_rank() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return 1;
  const int cores = CPU_COUNT(&allowed);
  const auto online = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  if (cores < online) return cores;
  MPI_Comm node = MPI_COMM_NULL;
  int ranks = 1;
  MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  MPI_Comm_size(node, &ranks);
  MPI_Comm_free(&node);
  return std::max(1, cores / ranks);
}

}  // namespace

Session::Session(int& argc, char**& argv) {
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
  MPI_Comm_rank(MPI_COMM_WORLD, &rank_);
  MPI_Comm_size(MPI_COMM_WORLD, &size_);
  if (provided < MPI_THREAD_SERIALIZED) {
    if (rank_ == 0) std::fputs("mics: expected an MPI with MPI_THREAD_SERIALIZED\n", stderr);
    leave(1);
  }

  // OpenMP and BLAS read their variables before main, and take the whole node for each rank where
  // the user set none. Kokkos warns where OMP_PROC_BIND is unset; binding is the launcher's
  // business.
  Kokkos::InitializationSettings settings;
  settings.set_disable_warnings(true);
  if (std::getenv("OMP_NUM_THREADS") == nullptr && std::getenv("KOKKOS_NUM_THREADS") == nullptr) {
    settings.set_num_threads(cores_of_this_rank());
  }
  Kokkos::initialize(settings);
  if (openblas_set_num_threads != nullptr && std::getenv("OPENBLAS_NUM_THREADS") == nullptr) {
    openblas_set_num_threads(Kokkos::DefaultHostExecutionSpace().concurrency());
  }
}

Session::~Session() {
  Kokkos::finalize();
  MPI_Finalize();
}

void Session::leave(int status) const {
  std::cout.flush();
  std::cerr.flush();
  std::fflush(nullptr);
  std::_Exit(status);
}

}  // namespace mics::apps
