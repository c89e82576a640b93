// SPDX-License-Identifier: Apache-2.0
#include <bench/race.hpp>

#include <algorithm>
#include <cstddef>
#ifdef __linux__
#include <sched.h>
#endif

namespace mics::apps::bench {
namespace {

// Quantile of sorted values, between its two neighbours.
double quantile(const std::vector<double>& sorted, double q) {
  const double position = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<std::size_t>(position);
  const std::size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (position - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

}  // namespace

void share_cores_evenly([[maybe_unused]] MPI_Comm comm) {
#ifdef __linux__
  MPI_Comm node = MPI_COMM_NULL;
  MPI_Comm_split_type(comm, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &node);
  int rank = 0;
  int ranks = 1;
  MPI_Comm_rank(node, &rank);
  MPI_Comm_size(node, &ranks);
  MPI_Comm_free(&node);
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  const int cores = CPU_COUNT(&allowed);
  if (cores < 2 || cores >= ranks) return;
  int turn = rank % cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (!CPU_ISSET(core, &allowed) || turn-- > 0) continue;
    cpu_set_t mine;
    CPU_ZERO(&mine);
    CPU_SET(core, &mine);
    sched_setaffinity(0, sizeof(mine), &mine);  // a wish: without it the spread is wider
    return;
  }
#endif
}

Times race(MPI_Comm comm, std::span<const Runner> runners, int rounds, int warm_ups) {
  Times times(runners.size());
  for (int round = -warm_ups; round < rounds; ++round) {
    const auto number = static_cast<std::size_t>(round + warm_ups);
    for (std::size_t i = 0; i < runners.size(); ++i) {
      const std::size_t step = number % 2 == 0 ? i : runners.size() - i;
      const std::size_t turn = (number + step) % runners.size();
      const Runner& runner = runners[turn];
      if (runner.prepare) runner.prepare();
      MPI_Barrier(comm);
      const double start = MPI_Wtime();
      runner.run();
      const double seconds = runner.seconds ? runner.seconds() : MPI_Wtime() - start;
      if (runner.finish) runner.finish();
      if (round >= 0) times[turn].push_back(seconds / runner.calls);
    }
  }
  for (std::vector<double>& of_runner : times) {
    MPI_Allreduce(MPI_IN_PLACE, of_runner.data(), static_cast<int>(of_runner.size()), MPI_DOUBLE,
                  MPI_MAX, comm);
  }
  return times;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return quantile(values, 0.5);
}

Ratio ratio(const std::vector<double>& other, const std::vector<double>& mine) {
  std::vector<double> ratios(mine.size());
  for (std::size_t i = 0; i < mine.size(); ++i) ratios[i] = other[i] / mine[i];
  std::sort(ratios.begin(), ratios.end());
  return {quantile(ratios, 0.5), quantile(ratios, 0.25), quantile(ratios, 0.75)};
}

}  // namespace mics::apps::bench
