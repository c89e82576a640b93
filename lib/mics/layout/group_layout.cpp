// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/layout/group_layout.hpp>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <unordered_map>

namespace mics::layout {
namespace {

std::string list(const std::vector<int>& values) {
  // A world of 100,000 ranks has few divisors, but a message stays one readable line.
  std::string text;
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (i == 24) return text + ", ...";
    text += (i == 0 ? "" : ", ") + std::to_string(values[i]);
  }
  return text;
}

}  // namespace

std::vector<int> shard_sizes_that_fit(int world_size) {
  std::vector<int> low;
  std::vector<int> high;
  for (int d = 1; static_cast<std::int64_t>(d) * d <= world_size; ++d) {
    if (world_size % d != 0) continue;
    low.push_back(d);
    if (d != world_size / d) high.push_back(world_size / d);
  }
  low.insert(low.end(), high.rbegin(), high.rend());
  return low;
}

GroupLayout GroupLayout::make(std::span<const int> node_of_rank, int shard_size,
                              std::string_view key) {
  const int world = static_cast<int>(node_of_rank.size());
  if (world < 1) {
    raise<ArgumentError>({.object = "world", .expected = "at least 1 rank", .found = "0"});
  }
  if (shard_size < 1 || world % shard_size != 0) {
    raise<ArgumentError>({.object = std::string(key),
                          .expected = "a divisor of the " + std::to_string(world) + " ranks",
                          .found = std::to_string(shard_size),
                          .remedy = "sizes that fit: " + list(shard_sizes_that_fit(world))});
  }

  // Nodes in the order of their lowest rank, which is the order of first appearance.
  std::unordered_map<int, int> node_index;
  std::vector<int> node(static_cast<std::size_t>(world));
  for (std::size_t r = 0; r < node.size(); ++r) {
    node[r] =
        node_index.try_emplace(node_of_rank[r], static_cast<int>(node_index.size())).first->second;
  }
  std::vector<int> order(node.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return node[static_cast<std::size_t>(a)] < node[static_cast<std::size_t>(b)];
  });

  GroupLayout layout;
  layout.shard_size_ = shard_size;
  layout.nodes_ = static_cast<int>(node_index.size());
  layout.places_.resize(node.size());
  layout.ranks_.resize(node.size());
  const int groups = world / shard_size;
  for (int group = 0; group < groups; ++group) {
    const auto first = order.begin() + static_cast<std::ptrdiff_t>(group) * shard_size;
    std::vector<int> members_on_node;  // of this group, by node in order
    int previous = -1;
    for (int i = 0; i < shard_size; ++i) {
      const int rank = first[i];
      const int its_node = node[static_cast<std::size_t>(rank)];
      if (its_node != previous) members_on_node.push_back(0);
      previous = its_node;
      Place& place = layout.places_[static_cast<std::size_t>(rank)];
      place = {.group = group,
               .shard = i,
               .node = static_cast<int>(members_on_node.size()) - 1,
               .lane = members_on_node.back()++};
    }
    const int nodes = static_cast<int>(members_on_node.size());
    const int lanes = members_on_node.front();
    const bool uniform = std::all_of(members_on_node.begin(), members_on_node.end(),
                                     [&](int count) { return count == lanes; });
    for (int i = 0; i < shard_size; ++i) {
      Place& place = layout.places_[static_cast<std::size_t>(first[i])];
      if (uniform) place.shard = lane_major_shard(place.node, place.lane, nodes);
      layout.ranks_[static_cast<std::size_t>(group) * static_cast<std::size_t>(shard_size) +
                    static_cast<std::size_t>(place.shard)] = first[i];
    }

    if (group == 0) {
      layout.nodes_per_group_ = nodes;
      layout.lanes_ = lanes;
    }
    if (!layout.obstacle_.empty()) continue;
    const std::string who = "shard group " + std::to_string(group);
    if (!uniform) {
      layout.obstacle_ = who + " has unequal numbers of ranks on its nodes";
    } else if (nodes == 1) {
      layout.obstacle_ = who + " lies on one node";
    } else if (lanes == 1) {
      layout.obstacle_ = who + " has one rank a node";
    } else if (nodes != layout.nodes_per_group_ || lanes != layout.lanes_) {
      layout.obstacle_ = who + " spans " + std::to_string(nodes) + " x " + std::to_string(lanes) +
                         " ranks, shard group 0 " + std::to_string(layout.nodes_per_group_) +
                         " x " + std::to_string(layout.lanes_);
    }
  }
  return layout;
}

}  // namespace mics::layout
