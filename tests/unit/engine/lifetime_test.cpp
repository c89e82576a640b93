// SPDX-License-Identifier: Apache-2.0
// Engines come and go without leaving communicators behind.
#include "communicator_count.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

namespace mics::test {
namespace {

TEST(LifetimeTest, FiftyEnginesOneAfterAnotherLeaveNoCommunicatorBehind) {
  const Toy toy;
  const int before = communicators;
  for (int i = 0; i < 50; ++i) {
    if (!in_sample()) continue;
    Config config = toy_config();
    if (i % 2 == 1) config.preset = Preset::ddp;
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    EXPECT_GT(communicators, before);
    EXPECT_FALSE(toy_step(engine, toy, 1).skipped);
  }
  EXPECT_EQ(communicators, before);
}

TEST(LifetimeTest, RefusedConstructionLeavesNoCommunicatorBehind) {
  const Toy toy;
  Config config = toy_config();
  const int before = communicators;

  config.preset = Preset::mics;
  config.shard_size = job_size() + 1;
  EXPECT_THROW(Engine(MPI_COMM_WORLD, toy.model, config), Error);
  config = toy_config();
  config.memory_budget = 10;
  EXPECT_THROW(Engine(MPI_COMM_WORLD, toy.model, config), Error);
  config = toy_config();
  config.timeout = -1;
  EXPECT_THROW(Engine(MPI_COMM_WORLD, toy.model, config), Error);

  EXPECT_EQ(communicators, before);
}

TEST(LifetimeTest, MovedEngineTrainsAndFreesOnce) {
  const Toy toy;
  const int before = communicators;
  {
    Engine first(MPI_COMM_WORLD, toy.model, toy_config());
    Engine second(std::move(first));
    EXPECT_FALSE(toy_step(second, toy, 1).skipped);
  }
  EXPECT_EQ(communicators, before);
}

TEST(LifetimeTest, SeveralEnginesLiveSideBySide) {
  const Toy toy;
  Engine a(MPI_COMM_WORLD, toy.model, toy_config());
  Engine b(MPI_COMM_WORLD, toy.model, toy_config());

  (void)toy_step(a, toy, 1);
  (void)toy_step(b, toy, 2);
  (void)toy_step(a, toy, 1);

  EXPECT_EQ(all_values(a), all_values(b));
}

}  // namespace
}  // namespace mics::test
