// SPDX-License-Identifier: Apache-2.0
#include <mics/parallel/process_groups.hpp>

#include <utility>

namespace mics::parallel {

std::vector<int> nodes_of_ranks(const comm::Communicator& world, int ranks_per_node) {
  std::vector<int> nodes(static_cast<std::size_t>(world.size()));
  if (ranks_per_node > 0) {
    for (std::size_t r = 0; r < nodes.size(); ++r) nodes[r] = static_cast<int>(r) / ranks_per_node;
    return nodes;
  }
  const comm::Communicator node = world.split_by_node();
  int lowest = 0;
  const int mine = world.rank();
  comm::check(MPI_Allreduce(&mine, &lowest, 1, MPI_INT, MPI_MIN, node.native()),
              "discovery of nodes");
  comm::check(MPI_Allgather(&lowest, 1, MPI_INT, nodes.data(), 1, MPI_INT, world.native()),
              "discovery of nodes");
  return nodes;
}

ProcessGroups::ProcessGroups(const comm::Communicator& world, const layout::GroupLayout& layout,
                             const std::vector<int>& node_of_rank, bool two_stage,
                             comm::TransportContext context) {
  const layout::Place& here = layout.place(world.rank());
  const auto node_of = [&](int group, int shard) {
    return node_of_rank[static_cast<std::size_t>(layout.rank_of(group, shard))];
  };
  const auto transport = [&](comm::Communicator group, std::vector<int> nodes) {
    return std::make_unique<comm::MpiTransport>(std::move(group), std::move(nodes), context);
  };

  std::vector<int> shard_nodes;
  for (int tau = 0; tau < layout.shard_size(); ++tau) {
    shard_nodes.push_back(node_of(here.group, tau));
  }
  std::vector<int> replica_nodes;
  for (int group = 0; group < layout.replicas(); ++group) {
    replica_nodes.push_back(node_of(group, here.shard));
  }
  const auto split_shard = [&] {
    return transport(world.split(here.group, here.shard), shard_nodes);
  };
  shard_ = split_shard();
  replica_ = transport(world.split(here.shard, here.group), replica_nodes);

  const auto channel = [&]() -> std::unique_ptr<ShardChannel> {
    if (!two_stage) return std::make_unique<ShardChannel>(split_shard());
    const int nodes = layout.nodes_per_group();
    const int lanes = layout.lanes();
    std::vector<int> intra_nodes;
    for (int lane = 0; lane < lanes; ++lane) {
      intra_nodes.push_back(node_of(here.group, layout::lane_major_shard(here.node, lane, nodes)));
    }
    std::vector<int> inter_nodes;
    for (int node = 0; node < nodes; ++node) {
      inter_nodes.push_back(node_of(here.group, layout::lane_major_shard(node, here.lane, nodes)));
    }
    auto intra = transport(world.split(here.group * nodes + here.node, here.lane), intra_nodes);
    auto inter = transport(world.split(here.group * lanes + here.lane, here.node), inter_nodes);
    return std::make_unique<ShardChannel>(std::move(intra), std::move(inter));
  };
  gather_ = channel();
  reduce_ = channel();
}

}  // namespace mics::parallel
