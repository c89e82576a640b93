// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/loader.hpp>

#include <span>
#include <vector>

namespace mics::checkpoint::detail {

/// Fills this rank's memory from a checkpoint. Where replicas share, each reads its part of what
/// all of them need, in batches, and sends it to the others while its disk reads the next.
///
/// Collective over `group`, all ranks of the job; blocks. A helper thread reads.
/// \param targets, place, broadcast  as of load()
/// \param batch_bytes  of all replicas together: small beside a state, so that little is left to
/// send
///                     when the last byte is read; large beside what ranks spend on meeting
/// \return what lies in the memory that this rank read itself: of a shared shard, its part
/// \throws what a rank's read throws, on every rank, when no thread reads any more: the memory's
///         contents are then undefined; CommError
[[nodiscard]] std::vector<ReadSum> read_shared(
    comm::MpiTransport& group, const Checkpoint& checkpoint, const StoredState& target,
    const layout::Place& place, std::span<const Target> targets, const Broadcast& broadcast,
    std::int64_t batch_bytes = std::int64_t{64} << 20);

}  // namespace mics::checkpoint::detail
