// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/mpi_transport.hpp>
#include <mics/layout/group_layout.hpp>
#include <mics/parallel/process_groups.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdint>
#include <cstring>
#include <vector>

namespace mics::parallel {
namespace {

// Groups of the whole job in one stage and in two, W ranks of `ranks_per_node` a node, p = W / R:
//
//   W = 4, two a node, p = 4: ranks 0 1 | 2 3 own shards 0 2 | 1 3
//   stage 1 (lanes)  rank 0: shards 0 1, rank 1: shards 2 3; stage 2 (node): all four
class ShardChannelTest : public testing::Test {
 protected:
  ShardChannelTest()
      : world_(comm::Communicator::duplicate(MPI_COMM_WORLD)),
        failures_(world_),
        context_{.failures = &failures_, .log = &log_} {}

  struct Groups {
    layout::GroupLayout layout;
    ProcessGroups groups;
  };
  Groups make(int shard_size, int ranks_per_node, bool two_stage) {
    const std::vector<int> nodes = nodes_of_ranks(world_, ranks_per_node);
    auto layout = layout::GroupLayout::make(nodes, shard_size);
    ProcessGroups groups(world_, layout, nodes, two_stage, context_);
    return {std::move(layout), std::move(groups)};
  }

  // Shapes with two stages that the job's size allows: (p, ranks a node).
  [[nodiscard]] std::vector<std::pair<int, int>> shapes() const {
    std::vector<std::pair<int, int>> result;
    for (int p = 4; p <= world_.size(); ++p) {
      for (int g = 2; g <= p / 2; ++g) {
        if (world_.size() % p == 0 && p % g == 0) result.emplace_back(p, g);
      }
    }
    return result;
  }

  comm::Communicator world_;
  comm::FailureChannel failures_;
  comm::OperationLog log_;
  comm::TransportContext context_;
};

float element(int group, int shard, std::int64_t i) {
  return static_cast<float>(group * 1000 + shard * 10) + static_cast<float>(i % 7);
}

TEST_F(ShardChannelTest, GathersTheSameBytesInOneStageAndInTwo) {
  for (const auto& [p, g] : shapes()) {
    Groups one = make(p, g, false);
    Groups two = make(p, g, true);
    ASSERT_TRUE(two.groups.gather().two_stage());
    const layout::Place here = one.layout.place(world_.rank());
    for (const std::int64_t count :
         {std::int64_t{256}, std::int64_t{5 * 256}, std::int64_t{100'096}}) {
      std::vector<float> shard(static_cast<std::size_t>(count));
      for (std::int64_t i = 0; i < count; ++i) {
        shard[static_cast<std::size_t>(i)] = element(here.group, here.shard, i);
      }
      const auto bytes = count * static_cast<std::int64_t>(sizeof(float));
      for (Groups* way : {&one, &two}) {
        std::vector<float> full(shard.size() * static_cast<std::size_t>(p), -1.0F);

        way->groups.gather()
            .start_gather(shard.data(), full.data(), bytes, {}, Execution())
            ->wait(Execution());

        for (int tau = 0; tau < p; ++tau) {
          for (std::int64_t i = 0; i < count; ++i) {
            ASSERT_EQ(full[static_cast<std::size_t>(tau * count + i)], element(here.group, tau, i));
          }
        }
      }
    }
  }
}

TEST_F(ShardChannelTest, ReducesToTheSameSumsInOneStageAndInTwo) {
  for (const auto& [p, g] : shapes()) {
    Groups one = make(p, g, false);
    Groups two = make(p, g, true);
    const layout::Place here = one.layout.place(world_.rank());
    const int nodes = two.layout.nodes_per_group();
    const std::int64_t count = 3 * 256;
    std::vector<float> full(static_cast<std::size_t>(p * count));
    for (std::size_t i = 0; i < full.size(); ++i) {
      full[i] = element(here.group, here.shard, static_cast<std::int64_t>(i));
    }
    for (Groups* way : {&one, &two}) {
      std::vector<float> shard(static_cast<std::size_t>(count), 100.0F);
      std::vector<float> scratch(static_cast<std::size_t>(nodes * count));

      way->groups.reduce().reduce(full.data(), shard.data(), count, {.mode = comm::SumMode::add},
                                  DType::fp32, scratch.data(), {}, Execution());

      for (std::int64_t i = 0; i < count; ++i) {
        float expected = 100.0F;
        for (int tau = 0; tau < p; ++tau) {
          expected += element(here.group, tau, here.shard * count + i);
        }
        ASSERT_EQ(shard[static_cast<std::size_t>(i)], expected);  // small integers: exact
      }
    }
  }
}

TEST_F(ShardChannelTest, ReplicaGroupsHoldTheSameShardOfEveryGroup) {
  for (int p = 1; p <= world_.size(); ++p) {
    if (world_.size() % p != 0) continue;
    Groups groups = make(p, world_.size(), false);
    const layout::Place here = groups.layout.place(world_.rank());
    ASSERT_EQ(groups.groups.shard().rank(), here.shard);
    ASSERT_EQ(groups.groups.replica().rank(), here.group);
    std::vector<int> shards(static_cast<std::size_t>(groups.groups.replica().size()));

    groups.groups.replica().all_gather_small(&here.shard, shards.data(), sizeof(int), {});

    EXPECT_EQ(shards, std::vector<int>(shards.size(), here.shard));
  }
}

}  // namespace
}  // namespace mics::parallel
