// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>
#include <mics/comm/device_sums.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/layout/group_layout.hpp>
#include <mics/parallel/shard_channel.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace mics::parallel {

/// The node of every rank of `world`, discovered from shared memory or, with `ranks_per_node` > 0,
/// taken as blocks of so many consecutive ranks. Collective over `world`; blocks.
[[nodiscard]] std::vector<int> nodes_of_ranks(const comm::Communicator& world, int ranks_per_node);

/// What the transports of an engine are made of, beside the groups.
struct Wiring {
  comm::TransportKind kind = comm::TransportKind::mpi;
  comm::DeviceSums sums = comm::DeviceSums::wire;
  Execution exec;  ///< in whose order small exchanges of device memory run
  /// Device memory for conversions: of hop 1 or its stage inside a node, between nodes, of hop 2.
  std::span<std::byte> hop1 = {};
  std::span<std::byte> between = {};
  std::span<std::byte> hop2 = {};
  /// Bytes of pinned memory of staged transports: of gathers, of hop 1, of hop 2 and of small
  /// exchanges of the shard group.
  std::int64_t staged_gather = 0;
  std::int64_t staged_reduce = 0;
  std::int64_t staged_replica = 0;
  std::int64_t staged_small = 0;
};

/// How device memory travels between these ranks, and why not faster: by NCCL if the build has it,
/// `wanted` is not off, and no two ranks share a device. The same on every rank. Collective over
/// `world`; blocks. \throws ConfigError if it is wanted and cannot be, or if ranks share a device
/// without `may_share`
struct Choice {
  comm::TransportKind kind = comm::TransportKind::mpi;
  std::string reason;
};
[[nodiscard]] Choice choose_device_transport(const comm::Communicator& world, bool require_nccl,
                                             bool want_nccl, bool may_share);

/// Every group of one rank, each with communicators of its own, all made up front by splitting one
/// parent: gathers and reductions never share one, so that they can be under way at once.
class ProcessGroups {
 public:
  /// Collective over `world`; blocks. \param two_stage  the same on all ranks; possible by `layout`
  ProcessGroups(const comm::Communicator& world, const layout::GroupLayout& layout,
                const std::vector<int>& node_of_rank, bool two_stage,
                comm::TransportContext context, const Wiring& wiring = {});

  [[nodiscard]] ShardChannel& gather() { return *gather_; }
  [[nodiscard]] ShardChannel& reduce() { return *reduce_; }
  /// All ranks of the shard group in shard order, for small exchanges; on a device they run in the
  /// order of Wiring::exec.
  [[nodiscard]] comm::Transport& shard() { return *shard_; }
  /// The instances in whose order collectives run.
  [[nodiscard]] std::vector<const Execution*> queues() const {
    return {&gather_->start_of_gather(), &gather_->end_of_gather(), &reduce_->start_of_reduce(),
            &reduce_->end_of_reduce(),   &shard_->execution(),      &replica_->execution()};
  }
  /// The ranks that hold this shard, in the order of their groups.
  [[nodiscard]] comm::Transport& replica() { return *replica_; }

 private:
  std::unique_ptr<comm::Transport> shard_;
  std::unique_ptr<comm::Transport> replica_;
  std::unique_ptr<ShardChannel> gather_;
  std::unique_ptr<ShardChannel> reduce_;
};

}  // namespace mics::parallel
