// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/layout/group_layout.hpp>
#include <mics/parallel/shard_channel.hpp>

#include <memory>
#include <vector>

namespace mics::parallel {

/// The node of every rank of `world`, discovered from shared memory or, with `ranks_per_node` > 0,
/// taken as blocks of so many consecutive ranks. Collective over `world`; blocks.
[[nodiscard]] std::vector<int> nodes_of_ranks(const comm::Communicator& world, int ranks_per_node);

/// Every group of one rank, each with communicators of its own, all made up front by splitting one
/// parent: gathers and reductions never share one, so that they can be under way at once.
class ProcessGroups {
 public:
  /// Collective over `world`; blocks. \param two_stage  the same on all ranks; possible by `layout`
  ProcessGroups(const comm::Communicator& world, const layout::GroupLayout& layout,
                const std::vector<int>& node_of_rank, bool two_stage,
                comm::TransportContext context);

  [[nodiscard]] ShardChannel& gather() { return *gather_; }
  [[nodiscard]] ShardChannel& reduce() { return *reduce_; }
  /// All ranks of the shard group in shard order, for small exchanges.
  [[nodiscard]] comm::Transport& shard() { return *shard_; }
  /// The ranks that hold this shard, in the order of their groups.
  [[nodiscard]] comm::Transport& replica() { return *replica_; }

 private:
  std::unique_ptr<comm::Transport> shard_;
  std::unique_ptr<comm::Transport> replica_;
  std::unique_ptr<ShardChannel> gather_;
  std::unique_ptr<ShardChannel> reduce_;
};

}  // namespace mics::parallel
