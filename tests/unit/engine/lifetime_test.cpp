// SPDX-License-Identifier: Apache-2.0
// Engines come and go without leaving communicators behind.
#include "toy.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <atomic>

namespace {

std::atomic<int> communicators{0};

}  // namespace

// MPI's profiling interface: these take the place of the library's own functions in this program.
extern "C" {
int MPI_Comm_dup(MPI_Comm comm, MPI_Comm* copy) {
  const int status = PMPI_Comm_dup(comm, copy);
  if (*copy != MPI_COMM_NULL) ++communicators;
  return status;
}
int MPI_Comm_split(MPI_Comm comm, int color, int key, MPI_Comm* part) {
  const int status = PMPI_Comm_split(comm, color, key, part);
  if (*part != MPI_COMM_NULL) ++communicators;
  return status;
}
int MPI_Comm_split_type(MPI_Comm comm, int type, int key, MPI_Info info, MPI_Comm* part) {
  const int status = PMPI_Comm_split_type(comm, type, key, info, part);
  if (*part != MPI_COMM_NULL) ++communicators;
  return status;
}
int MPI_Comm_create_group(MPI_Comm comm, MPI_Group group, int tag, MPI_Comm* part) {
  const int status = PMPI_Comm_create_group(comm, group, tag, part);
  if (*part != MPI_COMM_NULL) ++communicators;
  return status;
}
int MPI_Comm_free(MPI_Comm* comm) {
  --communicators;
  return PMPI_Comm_free(comm);
}
}

namespace mics::test {
namespace {

TEST(LifetimeTest, FiftyEnginesOneAfterAnotherLeaveNoCommunicatorBehind) {
  const Toy toy;
  const int before = communicators;
  for (int i = 0; i < 50; ++i) {
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
