// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/engine/config.hpp>

#include <program/session.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace mics::apps::bench {

/// What a command line can say.
struct Options {
  std::vector<std::uint64_t> sizes;  ///< bytes; what they are of is each command's own
  int pairs = 41;                    ///< measurements of mics, each beside one of what it races
  std::string preset;                ///< empty: zero3, or mics if a shard size is given
  int shard_size = 0;                ///< p of preset mics
  int ranks_per_node = 0;            ///< 0: nodes as they are
  std::string memory;                ///< `host` or `device`, where a command has both
  std::string directory = ".";       ///< where files are written
  std::string json;                  ///< file for the results; empty: none
  bool check = false;                ///< a missed bar makes the exit status 1
};

/// The engine's part of the options.
[[nodiscard]] Config engine_config(const Options& options);

// Each prints a table on rank 0 and returns the exit status. Collective over the session's ranks.

/// Gathers and reductions of one unit beside MPI's own collectives.
[[nodiscard]] int run_collectives(const Session& session, const Options& options);
/// The optimizer's kernel and the norm beside copies of memory.
[[nodiscard]] int run_optimizer(const Session& session, const Options& options);
/// The time that a step spends on comparing ranks beside the whole step.
[[nodiscard]] int run_checks(const Session& session, const Options& options);
/// In a build with NCCL: a device's gathers and reductions beside the bare calls.
[[nodiscard]] int run_device(const Session& session, const Options& options);
/// In a build with NCCL: a step without computation beside its floor.
[[nodiscard]] int run_step(const Session& session, const Options& options);
/// Saves, loads and stalls beside raw files and memory.
[[nodiscard]] int run_checkpoint(const Session& session, const Options& options);
/// In a build with CUDA: the parts of a GPT on the device of rank 0; `pairs` repetitions of each.
[[nodiscard]] int run_gpt(const Session& session, const Options& options);
/// In a build with CUDA: a step's gathers and reductions beside its matrix products.
[[nodiscard]] int run_overlap(const Session& session, const Options& options);
/// Resident memory of a training run beside its plan.
[[nodiscard]] int run_memory(const Session& session, const Options& options);

}  // namespace mics::apps::bench
