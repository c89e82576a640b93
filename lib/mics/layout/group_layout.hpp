// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mics::layout {

/// Shard of lane `lane` on node `node` of a group that spans `nodes` nodes: lane-major, so that the
/// gather between nodes writes the contiguous shards [lane * nodes, (lane + 1) * nodes) at their
/// final place and the gather inside the node completes the buffer without re-ordering.
[[nodiscard]] constexpr int lane_major_shard(int node, int lane, int nodes) {
  return lane * nodes + node;
}
[[nodiscard]] constexpr int lane_of_shard(int shard, int nodes) { return shard / nodes; }
[[nodiscard]] constexpr int node_of_shard(int shard, int nodes) { return shard % nodes; }

/// Where one rank stands.
struct Place {
  int group = 0;  ///< shard group, 0 .. R-1; also the rank's index in its replica group
  int shard = 0;  ///< tau, the slice of every buffer that it owns, 0 .. p-1
  int node = 0;   ///< index of its node within the group, 0 .. I-1
  int lane = 0;   ///< position among the group's ranks on that node
  friend constexpr bool operator==(const Place&, const Place&) = default;
};

/// The division of W ranks into R = W/p shard groups of close ranks, and who owns which shard.
///
/// Ranks are sorted by (node, rank); nodes by their lowest rank; groups are consecutive blocks of
/// p. Where every node of a group holds the same number g of its members, rank (node a, lane j)
/// owns shard j*I + a; otherwise the shard is the position in the group.
///
/// Example: W = 4 on 2 nodes (0, 0, 1, 1), p = 4: I = 2, g = 2 and ranks 0 1 2 3 own shards
/// 0 2 1 3. Stage 1 on lane 0 (ranks 0 and 2) brings shards 0 and 1, adjacent; stage 2 the rest.
class GroupLayout {
 public:
  /// \param node_of_rank  any label per rank, equal for ranks of one node
  /// \param shard_size    p >= 1
  /// \param key           what p is called in the message
  /// \throws ArgumentError if p does not divide W, with the sizes that fit
  [[nodiscard]] static GroupLayout make(std::span<const int> node_of_rank, int shard_size,
                                        std::string_view key = "shard_size");

  [[nodiscard]] int world_size() const { return static_cast<int>(places_.size()); }
  [[nodiscard]] int shard_size() const { return shard_size_; }
  [[nodiscard]] int replicas() const { return world_size() / shard_size_; }
  [[nodiscard]] const Place& place(int rank) const {
    return places_[static_cast<std::size_t>(rank)];
  }
  /// The rank that owns `shard` in `group`.
  [[nodiscard]] int rank_of(int group, int shard) const {
    return ranks_[static_cast<std::size_t>(group) * static_cast<std::size_t>(shard_size_) +
                  static_cast<std::size_t>(shard)];
  }
  /// Number of nodes of the whole job.
  [[nodiscard]] int nodes() const { return nodes_; }

  /// True if every group spans the same I > 1 nodes with the same g > 1 ranks on each.
  [[nodiscard]] bool two_stage_possible() const { return obstacle_.empty(); }
  /// Why not, naming the first group that prevents it; empty if possible.
  [[nodiscard]] const std::string& two_stage_obstacle() const { return obstacle_; }
  /// I and g of the two stages; valid if `two_stage_possible()`.
  [[nodiscard]] int nodes_per_group() const { return nodes_per_group_; }
  [[nodiscard]] int lanes() const { return lanes_; }

 private:
  int shard_size_ = 1;
  int nodes_ = 1;
  int nodes_per_group_ = 1;
  int lanes_ = 1;
  std::string obstacle_;
  std::vector<Place> places_;  // by rank
  std::vector<int> ranks_;     // by group * p + shard
};

/// All divisors of `world_size`, ascending: the shard sizes that fit.
[[nodiscard]] std::vector<int> shard_sizes_that_fit(int world_size);

}  // namespace mics::layout
