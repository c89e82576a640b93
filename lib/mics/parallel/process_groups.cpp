// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/comm/staged_transport.hpp>
#include <mics/parallel/process_groups.hpp>
#ifdef MICS_HAS_NCCL
#include <mics/comm/nccl_communicator.hpp>
#include <mics/comm/nccl_transport.hpp>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
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

namespace {

// The rank with the lowest number that shares this rank's device; its own if none does.
int first_on_device(const comm::Communicator& world) {
  const comm::Communicator node = world.split_by_node();
  std::array<char, 32> mine{};
  const std::string identity = device::identity();
  std::copy_n(identity.begin(), std::min(identity.size(), mine.size() - 1), mine.begin());
  std::vector<std::array<char, 32>> all(static_cast<std::size_t>(node.size()));
  comm::check(MPI_Allgather(mine.data(), static_cast<int>(mine.size()), MPI_CHAR, all.data(),
                            static_cast<int>(mine.size()), MPI_CHAR, node.native()),
              "discovery of devices");
  const auto first = static_cast<int>(std::find(all.begin(), all.end(), mine) - all.begin());
  std::vector<int> ranks(static_cast<std::size_t>(node.size()));
  const int rank = world.rank();
  comm::check(MPI_Allgather(&rank, 1, MPI_INT, ranks.data(), 1, MPI_INT, node.native()),
              "discovery of devices");
  return ranks[static_cast<std::size_t>(first)];
}

// What a group is for; more than one can be under way at once.
enum class Use : std::uint8_t { small, replica, gather, reduce };

#ifdef MICS_HAS_NCCL
// Whether a group is the world, rank for rank. The same on all of its ranks.
bool has_order_of(const comm::Communicator& world, const comm::MpiTransport& group) {
  if (group.size() == 1 || group.size() != world.size()) return false;
  const std::vector<int> ranks = group.world_ranks();
  return std::is_sorted(ranks.begin(), ranks.end());
}
#endif

}  // namespace

Choice choose_device_transport(const comm::Communicator& world, bool require_nccl, bool want_nccl,
                               bool may_share) {
  std::string obstacle;
#ifndef MICS_HAS_NCCL
  obstacle = "this build has no NCCL";
#endif
  if (device::separate) {
    const int first = first_on_device(world);
    comm::agree(world, [&] {
      if (first == world.rank() || may_share) return;
      raise<ConfigError>(
          {.object = "device of rank " + std::to_string(world.rank()),
           .expected = "one device a rank",
           .found = device::identity() + ", which rank " + std::to_string(first) + " uses too",
           .remedy = "start one rank a device, or set \"share_device\" to true"});
    });
    const int mine = first == world.rank() ? 0 : 1;
    int shared = 0;
    comm::check(MPI_Allreduce(&mine, &shared, 1, MPI_INT, MPI_MAX, world.native()),
                "discovery of devices");
    if (shared != 0 && obstacle.empty()) obstacle = "ranks share a device";
  }
  if (!want_nccl && obstacle.empty()) obstacle = "NCCL is switched off";
  if (obstacle.empty()) return {comm::TransportKind::nccl, {}};
  comm::agree(world, [&] {
    if (!require_nccl) return;
    raise<ConfigError>({.object = "nccl",
                        .expected = "ranks that can use it",
                        .found = obstacle,
                        .remedy = "use \"auto\""});
  });
  return {comm::TransportKind::staged, "no NCCL: " + obstacle};
}

ProcessGroups::ProcessGroups(const comm::Communicator& world, const layout::GroupLayout& layout,
                             const std::vector<int>& node_of_rank, bool two_stage,
                             comm::TransportContext context, const Wiring& wiring) {
  const layout::Place& here = layout.place(world.rank());
  const auto node_of = [&](int group, int shard) {
    return node_of_rank[static_cast<std::size_t>(layout.rank_of(group, shard))];
  };
  // All ranks form the shard group, or each is one of its own; else no group holds all.
  [[maybe_unused]] const Use last_of_world = layout.shard_size() == 1 ? Use::replica : Use::reduce;
#ifdef MICS_HAS_NCCL
  // A group of one rank needs no communicator, and making one takes as long as for many.
  std::optional<comm::NcclCommunicator> parent;
  if (wiring.kind == comm::TransportKind::nccl && world.size() > 1) {
    parent = comm::NcclCommunicator::create(world);
  }
#endif

  // One group: its ranks by colour and key, the nodes they lie on, the instance it works on and
  // its memory for conversions. A group for small exchanges takes few of a device's processors and
  // has no such memory: its sums are exact, whoever adds. The last group that is made of all ranks
  // takes the parent: each communicator costs tenths of a second.
  const auto transport = [&](int color, int key, std::vector<int> nodes, const auto& make_instance,
                             [[maybe_unused]] std::span<std::byte> staging, std::int64_t staged,
                             [[maybe_unused]] Use use) -> std::unique_ptr<comm::Transport> {
    auto messages =
        std::make_unique<comm::MpiTransport>(world.split(color, key), std::move(nodes), context);
    switch (wiring.kind) {
      case comm::TransportKind::mpi:
        return messages;
      case comm::TransportKind::nccl:
#ifdef MICS_HAS_NCCL
      {
        const bool last_of_all = use == last_of_world && has_order_of(world, *messages);
        comm::NcclCommunicator group;
        if (last_of_all) {
          group = *std::exchange(parent, std::nullopt);
        } else if (messages->size() > 1) {
          group = parent->split(color, key, use == Use::small ? 1 : 0);
        }
        const comm::DeviceSums sums = staging.empty() ? comm::DeviceSums::wire : wiring.sums;
        const bool in_order = sums == comm::DeviceSums::fp32;
        const bool reduces = use == Use::reduce || use == Use::replica;
        return std::make_unique<comm::NcclTransport>(
            std::move(group), std::move(messages), make_instance(), context, sums, staging,
            comm::NcclCommunicator::Uses{.gathers = use == Use::gather,
                                         .sums = use != Use::gather && !in_order,
                                         .messages = reduces && in_order},
            use != Use::small);
      }
#endif
      case comm::TransportKind::staged:
        break;
    }
    return std::make_unique<comm::StagedTransport>(std::move(messages), make_instance(), staged);
  };
  const auto own_instance = [] { return device::make_instance(true); };
  const auto given_instance = [&] { return wiring.exec; };

  std::vector<int> shard_nodes;
  for (int tau = 0; tau < layout.shard_size(); ++tau) {
    shard_nodes.push_back(node_of(here.group, tau));
  }
  std::vector<int> replica_nodes;
  for (int group = 0; group < layout.replicas(); ++group) {
    replica_nodes.push_back(node_of(group, here.shard));
  }
  shard_ = transport(here.group, here.shard, shard_nodes, given_instance, {}, wiring.staged_small,
                     Use::small);
  replica_ = transport(here.shard, here.group, replica_nodes, own_instance, wiring.hop2,
                       wiring.staged_replica, Use::replica);

  const auto channel = [&](std::span<std::byte> inside, std::span<std::byte> between,
                           std::int64_t staged, Use use) -> std::unique_ptr<ShardChannel> {
    if (!two_stage) {
      return std::make_unique<ShardChannel>(
          transport(here.group, here.shard, shard_nodes, own_instance, inside, staged, use));
    }
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
    auto intra = transport(here.group * nodes + here.node, here.lane, intra_nodes, own_instance,
                           inside, staged, use);
    auto inter = transport(here.group * lanes + here.lane, here.node, inter_nodes, own_instance,
                           between, staged, use);
    return std::make_unique<ShardChannel>(std::move(intra), std::move(inter));
  };
  gather_ = channel({}, {}, wiring.staged_gather, Use::gather);
  reduce_ = channel(wiring.hop1, wiring.between, wiring.staged_reduce, Use::reduce);
}

}  // namespace mics::parallel
