// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/log.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/stored_state.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/layout/group_layout.hpp>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>

namespace mics::checkpoint {

/// Copies `bytes` bytes from rank `root` of the replica group to all of it; called by all of them
/// in the same order.
using Broadcast = std::function<void(void* data, std::int64_t bytes, int root)>;

/// Fills the memory of all ranks of a job from a directory: from the newest step that verifies, in
/// whatever layout it was saved. A damaged step costs a warning, and the next older one is taken.
/// One that a job which saves there removes or replaces meanwhile is no damage: the newest is
/// looked for again.
///
/// Collective over `group`, all ranks of the job; blocks. Replicas read each byte once: each reads
/// its part of the shard, and they share what is there while their disks go on. Every block is
/// verified; what was put in memory is summed there, and at the end the digests of
/// the new layout are compared with those of the save, but for arrays whose dtype changed. Memory:
/// 8 MiB of buffers a rank, the manifest. Cost: 1/R of the shard read from disk, the broadcasts
/// of the last 64 MiB of the shard.
/// \param target     describes the memory; the same on every rank
/// \param place      of this rank: shard and, as group, replica
/// \param targets    host memory of this rank's shard (or slice); arrays that are left out are not
///                   read
/// \param broadcast  over the replica group; empty: every rank reads all that it needs
/// \param step       a step that must be taken; none: the newest
/// \return what was loaded, with its values and blobs; none if the directory has no step and none
///         was asked for. The same on every rank
/// \throws FormatError on every rank if the step asked for, or every step, is damaged (the memory's
///         contents are then undefined), or if the model or the optimizer is another (the memory is
///         as it was); IoError if the directory cannot be read; CommError if a rank is gone or does
///         not come, within the transport's time limit: how long disks take does not count
[[nodiscard]] std::optional<Checkpoint> load(comm::MpiTransport& group,
                                             const std::filesystem::path& directory,
                                             const StoredState& target, const layout::Place& place,
                                             std::span<const Target> targets,
                                             const Broadcast& broadcast,
                                             std::optional<std::int64_t> step, const LogSink& log,
                                             SystemCalls& calls = SystemCalls::native());

}  // namespace mics::checkpoint
