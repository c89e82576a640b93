// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mpi.h>

#include <functional>
#include <span>
#include <string>
#include <vector>

namespace mics::apps::bench {

/// One of the things that are timed beside each other.
struct Runner {
  std::string name;
  std::function<void()> run;           ///< timed
  int calls = 1;                       ///< times that `run` does its work: a time is that of one
  std::function<void()> prepare = {};  ///< before the barrier, not timed
  std::function<void()> finish = {};   ///< afterwards, not timed
  /// Seconds that the last run took, where the clock of the host around it does not tell; blocks
  /// until that run is done.
  std::function<double()> seconds = {};
};

/// Seconds a call by runner and round: the longest of all ranks.
using Times = std::vector<std::vector<double>>;

/// Where a machine has fewer cores than ranks, binds each of them to one, in turn. Otherwise the
/// scheduler draws anew in each run which ranks share a core, and with it whether a ring, whose
/// ranks wait for their neighbours, is 20 % slower. Collective over `comm`; nothing happens to
/// ranks that are bound already.
void share_cores_evenly(MPI_Comm comm);

/// Times the runners in turn, round after round, so that what else the machine does hits all alike;
/// each round begins with another one and goes the other way round than the last, so that each
/// comes after every other as often. A barrier lies before each timing. Collective over `comm`.
/// \param warm_ups  rounds before, which are not counted: the first pass of an engine is recorded
///                  and the second is the first to follow it; MPI opens its connections in the
///                  first call
[[nodiscard]] Times race(MPI_Comm comm, std::span<const Runner> runners, int rounds,
                         int warm_ups = 3);

[[nodiscard]] double median(std::vector<double> values);

/// How much longer `other` takes than `mine`, round by round.
struct Ratio {
  double median = 0;
  double low = 0;   ///< first quartile
  double high = 0;  ///< third quartile
};
[[nodiscard]] Ratio ratio(const std::vector<double>& other, const std::vector<double>& mine);

}  // namespace mics::apps::bench
