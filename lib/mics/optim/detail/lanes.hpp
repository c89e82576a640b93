// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>

#include <Kokkos_Core.hpp>

#include <cstdint>

// Sums whose bits depend on nothing but the elements: a fixed number of lanes, each a running sum
// in a fixed order, then a tree over the lanes. The threads of a team, however many, share the
// lanes out among themselves.

namespace mics::optim::detail {

inline constexpr int sum_lanes = 256;

using TeamPolicy = Kokkos::TeamPolicy<device::Space>;
using Member = TeamPolicy::member_type;

/// One thread a lane on a device; a team of one on a host, whose threads take whole teams.
inline constexpr int team_threads = device::separate ? sum_lanes : 1;

/// Teams with `arrays` arrays of lanes each.
[[nodiscard]] inline TeamPolicy team_policy(const Execution& exec, std::int64_t teams, int arrays) {
  TeamPolicy policy(exec.as<device::Space>(), static_cast<int>(teams), team_threads);
  policy.set_scratch_size(0,
                          Kokkos::PerTeam(arrays * sum_lanes * static_cast<int>(sizeof(double))));
  // Kokkos asks CUDA for global scratch in every launch that wants none, and keeps what it got for
  // one that does.
  if constexpr (device::separate) policy.set_scratch_size(1, Kokkos::PerTeam(8));
  return policy;
}

/// The team's arrays of lanes, one behind the other.
KOKKOS_INLINE_FUNCTION double* team_lanes(const Member& team, int arrays) {
  return static_cast<double*>(team.team_scratch(0).get_shmem(
      static_cast<std::size_t>(arrays * sum_lanes) * sizeof(double)));
}

/// Adds up the lanes of each array into its first one. All threads of the team call it; they see
/// the sums when it returns.
KOKKOS_INLINE_FUNCTION void fold_lanes(const Member& team, double* lanes, int arrays) {
  team.team_barrier();
  for (int half = sum_lanes / 2; half > 0; half /= 2) {
    for (int i = team.team_rank(); i < arrays * half; i += team.team_size()) {
      const int at = i / half * sum_lanes + i % half;
      lanes[at] += lanes[at + half];
    }
    team.team_barrier();
  }
}

}  // namespace mics::optim::detail
