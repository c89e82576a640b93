// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>
#include <mics/comm/failure_channel.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/comm/operation_log.hpp>
#include <support/job.hpp>

#include <mpi.h>

#include <chrono>
#include <string>
#include <vector>

namespace mics::comm::test {

using mics::test::job_rank;
using mics::test::job_size;

using Clock = std::chrono::steady_clock;

[[nodiscard]] inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Keeps ranks together between the phases of a test, apart from what is tested.
inline void meet() { MPI_Barrier(MPI_COMM_WORLD); }

/// Pretended nodes of the ranks: what decides between a direct exchange and a ring.
struct Nodes {
  const char* name;
  std::vector<int> label;  // by rank
};

[[nodiscard]] inline std::vector<Nodes> node_patterns() {
  Nodes one{"one node", {}}, apart{"a node each", {}}, blocks{"two blocks", {}},
      woven{"two nodes by turns", {}};
  for (int rank = 0; rank < job_size(); ++rank) {
    one.label.push_back(0);
    apart.label.push_back(rank);
    blocks.label.push_back(rank < (job_size() + 1) / 2 ? 7 : 3);
    woven.label.push_back(rank % 2);
  }
  return {one, apart, blocks, woven};
}

/// A transport over all ranks of the job with what it shares.
struct World {
  Communicator comm = Communicator::duplicate(MPI_COMM_WORLD);
  FailureChannel failures{comm};
  OperationLog log;
  MpiTransport transport;

  explicit World(const std::vector<int>& node_of_rank,
                 std::chrono::milliseconds timeout = std::chrono::seconds(60))
      : transport(Communicator::duplicate(MPI_COMM_WORLD), node_of_rank,
                  {.failures = &failures, .log = &log, .timeout = timeout}) {}
  World() : World(std::vector<int>(static_cast<std::size_t>(job_size()), 0)) {}
};

inline constexpr Operation operation{.purpose = Purpose::gather, .object = "test", .bytes = 0};

}  // namespace mics::comm::test
