// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/layout/group_layout.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace mics::layout {
namespace {

std::vector<int> blocks(int world, int node_size) {
  std::vector<int> node_of_rank;
  for (int rank = 0; rank < world; ++rank) node_of_rank.push_back(rank / node_size);
  return node_of_rank;
}

/// Ranks sorted by node, nodes by their lowest rank: written here from the text of the design.
std::vector<int> sorted_ranks(const std::vector<int>& node_of_rank) {
  std::map<int, int> lowest;
  for (int rank = static_cast<int>(node_of_rank.size()) - 1; rank >= 0; --rank) {
    lowest[node_of_rank[static_cast<std::size_t>(rank)]] = rank;
  }
  std::vector<std::pair<int, int>> keys;
  for (int rank = 0; rank < static_cast<int>(node_of_rank.size()); ++rank) {
    keys.emplace_back(lowest[node_of_rank[static_cast<std::size_t>(rank)]], rank);
  }
  std::ranges::sort(keys);
  std::vector<int> ranks;
  for (const auto& key : keys) ranks.push_back(key.second);
  return ranks;
}

/// Every property that a layout has, whatever the nodes.
void expect_consistent(const GroupLayout& layout, const std::vector<int>& node_of_rank, int p) {
  const int world = static_cast<int>(node_of_rank.size());
  const auto label = [&](int rank) { return node_of_rank[static_cast<std::size_t>(rank)]; };
  ASSERT_EQ(layout.world_size(), world);
  ASSERT_EQ(layout.shard_size(), p);
  ASSERT_EQ(layout.replicas(), world / p);
  ASSERT_EQ(layout.nodes(),
            static_cast<int>(std::set<int>(node_of_rank.begin(), node_of_rank.end()).size()));

  // (group, shard) -> rank is a bijection, and its inverse is place().
  std::set<int> ranks;
  for (int group = 0; group < world / p; ++group) {
    for (int shard = 0; shard < p; ++shard) {
      const int rank = layout.rank_of(group, shard);
      ASSERT_GE(rank, 0);
      ASSERT_LT(rank, world);
      ranks.insert(rank);
      ASSERT_EQ(layout.place(rank).group, group);
      ASSERT_EQ(layout.place(rank).shard, shard);
    }
  }
  ASSERT_EQ(static_cast<int>(ranks.size()), world);

  // Groups are consecutive blocks of the sorted ranks; node and lane count within the group.
  const std::vector<int> order = sorted_ranks(node_of_rank);
  for (int group = 0; group < world / p; ++group) {
    std::vector<int> nodes;  // labels in order of appearance
    std::vector<int> members;
    for (int i = 0; i < p; ++i) {
      const int rank = order[static_cast<std::size_t>(group * p + i)];
      if (nodes.empty() || nodes.back() != label(rank)) {
        nodes.push_back(label(rank));
        members.push_back(0);
      }
      const Place& place = layout.place(rank);
      ASSERT_EQ(place.group, group) << "rank " << rank;
      ASSERT_EQ(place.node, static_cast<int>(nodes.size()) - 1) << "rank " << rank;
      ASSERT_EQ(place.lane, members.back()) << "rank " << rank;
      ++members.back();
    }
    const bool uniform = std::ranges::all_of(members, [&](int m) { return m == members[0]; });
    for (int i = 0; i < p; ++i) {
      const int rank = order[static_cast<std::size_t>(group * p + i)];
      const Place& place = layout.place(rank);
      const int expected = uniform ? place.lane * static_cast<int>(nodes.size()) + place.node : i;
      ASSERT_EQ(place.shard, expected) << "rank " << rank;
    }
  }
}

/// Plays the two gathers of one group on integers: shard tau holds the number tau.
void expect_two_stages_complete_in_place(const GroupLayout& layout, int group) {
  const int nodes = layout.nodes_per_group();
  const int lanes = layout.lanes();
  const int p = layout.shard_size();
  ASSERT_EQ(nodes * lanes, p);
  const auto rank_at = [&](int node, int lane) {
    for (int shard = 0; shard < p; ++shard) {
      const int rank = layout.rank_of(group, shard);
      if (layout.place(rank).node == node && layout.place(rank).lane == lane) return rank;
    }
    return -1;
  };
  // Stage 1: the ranks of one lane in node order write next to each other, from lane * I on.
  std::map<int, std::vector<int>> buffer;  // by rank
  for (int lane = 0; lane < lanes; ++lane) {
    for (int reader = 0; reader < nodes; ++reader) {
      auto& full = buffer[rank_at(reader, lane)];
      full.assign(static_cast<std::size_t>(p), -1);
      for (int node = 0; node < nodes; ++node) {
        full[static_cast<std::size_t>(lane * nodes + node)] =
            layout.place(rank_at(node, lane)).shard;
      }
    }
  }
  // Stage 2: inside each node, piece `lane` of I shards comes from that lane, at its own place.
  const auto after_stage_1 = buffer;
  for (int node = 0; node < nodes; ++node) {
    for (int reader = 0; reader < lanes; ++reader) {
      for (int lane = 0; lane < lanes; ++lane) {
        const auto& piece = after_stage_1.at(rank_at(node, lane));
        std::copy_n(piece.begin() + lane * nodes, nodes,
                    buffer[rank_at(node, reader)].begin() + lane * nodes);
      }
    }
  }
  std::vector<int> expected(static_cast<std::size_t>(p));
  std::iota(expected.begin(), expected.end(), 0);
  for (const auto& [rank, full] : buffer) ASSERT_EQ(full, expected) << "rank " << rank;
}

TEST(GroupLayoutTest, IsABijectionOfConsecutiveBlocksForEveryUniformJobUpTo64Ranks) {
  for (int world = 1; world <= 64; ++world) {
    for (int p = 1; p <= world; ++p) {
      if (world % p != 0) continue;
      for (int node_size = 1; node_size <= world; ++node_size) {
        SCOPED_TRACE("W=" + std::to_string(world) + " p=" + std::to_string(p) +
                     " ranks a node=" + std::to_string(node_size));
        const auto node_of_rank = blocks(world, node_size);  // the last node may be smaller

        const auto layout = GroupLayout::make(node_of_rank, p);

        expect_consistent(layout, node_of_rank, p);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(GroupLayoutTest, TwoStagesCompleteEveryBufferInPlaceWithoutReordering) {
  int possible = 0;
  for (int world = 1; world <= 64; ++world) {
    for (int p = 1; p <= world; ++p) {
      if (world % p != 0) continue;
      for (int node_size = 1; node_size <= world; ++node_size) {
        SCOPED_TRACE("W=" + std::to_string(world) + " p=" + std::to_string(p) +
                     " ranks a node=" + std::to_string(node_size));
        const auto layout = GroupLayout::make(blocks(world, node_size), p);
        // Groups of whole nodes, more than one of them, more than one rank on each.
        const bool whole_nodes =
            node_size > 1 && p % node_size == 0 && p > node_size && world % node_size == 0;
        if (whole_nodes) {
          EXPECT_TRUE(layout.two_stage_possible()) << layout.two_stage_obstacle();
          EXPECT_EQ(layout.lanes(), node_size);
        }
        if (p <= node_size && node_size % p == 0) {
          EXPECT_FALSE(layout.two_stage_possible());
        }
        EXPECT_EQ(layout.two_stage_possible(), layout.two_stage_obstacle().empty());
        if (!layout.two_stage_possible()) continue;

        ++possible;
        for (int group = 0; group < layout.replicas(); ++group) {
          expect_two_stages_complete_in_place(layout, group);
          if (HasFatalFailure()) return;
        }
      }
    }
  }
  EXPECT_GT(possible, 100);
}

TEST(GroupLayoutTest, TwoStagesAreExactlyThereWhereAllGroupsHaveTheSameNodesAndLanes) {
  for (int world = 1; world <= 24; ++world) {
    for (int p = 1; p <= world; ++p) {
      if (world % p != 0) continue;
      for (int seed = 0; seed < 20; ++seed) {
        std::vector<int> node_of_rank;
        unsigned state = static_cast<unsigned>(seed) * 7919U + static_cast<unsigned>(world);
        for (int rank = 0; rank < world; ++rank) {
          state = state * 1664525U + 1013904223U;
          node_of_rank.push_back(static_cast<int>((state >> 20) % (seed < 10 ? 2U : 4U)));
        }
        SCOPED_TRACE("W=" + std::to_string(world) + " p=" + std::to_string(p) + " seed " +
                     std::to_string(seed));

        const auto layout = GroupLayout::make(node_of_rank, p);

        expect_consistent(layout, node_of_rank, p);
        std::set<std::pair<int, int>> shapes;  // (I, g) of every group; g = 0 if not uniform
        for (int group = 0; group < world / p; ++group) {
          std::map<int, int> members;
          for (int shard = 0; shard < p; ++shard) {
            ++members[layout.place(layout.rank_of(group, shard)).node];
          }
          const bool uniform = std::ranges::all_of(
              members, [&](const auto& m) { return m.second == members.begin()->second; });
          shapes.emplace(members.size(), uniform ? members.begin()->second : 0);
        }
        const bool possible =
            shapes.size() == 1 && shapes.begin()->first > 1 && shapes.begin()->second > 1;
        EXPECT_EQ(layout.two_stage_possible(), possible) << layout.two_stage_obstacle();
        if (possible) {
          EXPECT_EQ(layout.nodes_per_group(), shapes.begin()->first);
          EXPECT_EQ(layout.lanes(), shapes.begin()->second);
        }
      }
    }
  }
}

TEST(GroupLayoutTest, FollowsPermutedRanksToTheirNodes) {
  // Ranks dealt out in turns to nodes with labels in no order: 2, 0 and 1 by lowest rank.
  const std::vector<int> node_of_rank{42, -7, 9, 42, -7, 9};

  const auto layout = GroupLayout::make(node_of_rank, 2);

  expect_consistent(layout, node_of_rank, 2);
  EXPECT_EQ(layout.rank_of(0, 0), 0);
  EXPECT_EQ(layout.rank_of(0, 1), 3);
  EXPECT_EQ(layout.rank_of(1, 0), 1);
  EXPECT_EQ(layout.rank_of(1, 1), 4);
  EXPECT_EQ(layout.rank_of(2, 0), 2);
  EXPECT_EQ(layout.rank_of(2, 1), 5);
}

TEST(GroupLayoutTest, UsesThePositionWhereNodesOfAGroupDiffer) {
  const std::vector<int> node_of_rank{0, 0, 0, 1};

  const auto layout = GroupLayout::make(node_of_rank, 4);

  for (int rank = 0; rank < 4; ++rank) EXPECT_EQ(layout.place(rank).shard, rank);
  EXPECT_FALSE(layout.two_stage_possible());
}

TEST(GroupLayoutTest, NamesTheFirstGroupThatPreventsTwoStages) {
  // Group 0 spans two nodes evenly, group 1 does not.
  const std::vector<int> node_of_rank{0, 0, 1, 1, 2, 2, 2, 3};

  const auto layout = GroupLayout::make(node_of_rank, 4);

  EXPECT_FALSE(layout.two_stage_possible());
  EXPECT_NE(layout.two_stage_obstacle().find("group 1"), std::string::npos)
      << layout.two_stage_obstacle();
}

TEST(GroupLayoutTest, ReproducesTheExampleOfItsComment) {
  const auto layout = GroupLayout::make(std::vector<int>{0, 0, 1, 1}, 4);

  EXPECT_EQ(layout.nodes_per_group(), 2);
  EXPECT_EQ(layout.lanes(), 2);
  EXPECT_EQ(layout.place(0).shard, 0);
  EXPECT_EQ(layout.place(1).shard, 2);
  EXPECT_EQ(layout.place(2).shard, 1);
  EXPECT_EQ(layout.place(3).shard, 3);
}

TEST(GroupLayoutTest, LaneMajorShardsInvertAndAreConstants) {
  static_assert(lane_major_shard(1, 0, 2) == 1 && lane_major_shard(0, 1, 2) == 2);
  for (int nodes = 1; nodes <= 8; ++nodes) {
    for (int lanes = 1; lanes <= 8; ++lanes) {
      for (int node = 0; node < nodes; ++node) {
        for (int lane = 0; lane < lanes; ++lane) {
          const int shard = lane_major_shard(node, lane, nodes);
          EXPECT_EQ(shard, lane * nodes + node);
          EXPECT_EQ(lane_of_shard(shard, nodes), lane);
          EXPECT_EQ(node_of_shard(shard, nodes), node);
        }
      }
    }
  }
}

TEST(GroupLayoutTest, RefusesAShardSizeThatDoesNotFitAndNamesThoseThatDo) {
  for (const int p : {5, 0, -3, 13}) {
    try {
      (void)GroupLayout::make(blocks(12, 4), p);
      FAIL() << "p=" << p << " was accepted";
    } catch (const ArgumentError& error) {
      const std::string text = error.what();
      EXPECT_NE(text.find("1, 2, 3, 4, 6, 12"), std::string::npos) << text;
      EXPECT_NE(text.find(std::to_string(p)), std::string::npos) << text;
      EXPECT_NE(text.find("expected"), std::string::npos) << text;
      EXPECT_NE(text.find("found"), std::string::npos) << text;
      EXPECT_EQ(text.find('\n'), std::string::npos) << text;
    }
  }
}

TEST(GroupLayoutTest, ShardSizesThatFitAreTheDivisors) {
  EXPECT_EQ(shard_sizes_that_fit(1), (std::vector<int>{1}));
  EXPECT_EQ(shard_sizes_that_fit(7), (std::vector<int>{1, 7}));
  EXPECT_EQ(shard_sizes_that_fit(24), (std::vector<int>{1, 2, 3, 4, 6, 8, 12, 24}));
  EXPECT_EQ(shard_sizes_that_fit(36), (std::vector<int>{1, 2, 3, 4, 6, 9, 12, 18, 36}));
}

TEST(GroupLayoutTest, LaysOut512Ranks) {
  const auto node_of_rank = blocks(512, 8);
  for (const int p : {1, 8, 16, 64, 512}) {
    SCOPED_TRACE("p=" + std::to_string(p));

    const auto layout = GroupLayout::make(node_of_rank, p);

    expect_consistent(layout, node_of_rank, p);
    EXPECT_EQ(layout.two_stage_possible(), p > 8);
    if (layout.two_stage_possible()) expect_two_stages_complete_in_place(layout, 0);
  }
}

TEST(GroupLayoutTest, LaysOut100000Ranks) {
  const auto node_of_rank = blocks(100'000, 4);
  for (const int p : {4, 1000, 100'000}) {
    SCOPED_TRACE("p=" + std::to_string(p));

    const auto layout = GroupLayout::make(node_of_rank, p);

    expect_consistent(layout, node_of_rank, p);
    EXPECT_EQ(layout.two_stage_possible(), p > 4);
  }
}

}  // namespace
}  // namespace mics::layout
