// SPDX-License-Identifier: Apache-2.0
// What only a build with a device can show: what it refuses, and how much of its memory it takes.
#include "kernel_client.hpp"
#include "layouts.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

namespace mics::test {
namespace {

static_assert(device::separate, "this test is of a device");

TEST(DeviceRefusalTest, ViewOfTheHostIsNamed) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  engine.begin_micro_step({.samples = 1, .last = true});
  const Lease lease = engine.gather(toy.units[0]);
  auto scope = engine.gradient(toy.units[0]);
  using Right = Kokkos::LayoutRight;

  expect_error<ArgumentError>(
      [&] { (void)lease.view<const float**, Right, Kokkos::HostSpace>(toy.weight[0]); },
      {"\"a/weight\"", "a view of device memory", "Host"});
  expect_error<ArgumentError>(
      [&] { (void)scope.view<float*, Right, Kokkos::HostSpace>(toy.bias[0]); },
      {"\"a/bias\"", "a view of device memory", "Host"});
  expect_error<ArgumentError>([&] { (void)engine.loss<Kokkos::HostSpace>(); },
                              {"loss", "a view of device memory", "Host"});
  scope.reduce();
}

TEST(DeviceRefusalTest, ViewOfTheDeviceOnStateInHostMemoryIsNamed) {
  const Toy toy;
  Config config = toy_config();
  config.memory = Memory::host;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  engine.begin_evaluation();
  const Lease lease = engine.gather(toy.units[0]);

  expect_error<ArgumentError>([&] { (void)lease.view<const float**>(toy.weight[0]); },
                              {"\"a/weight\"", "a view of host memory", "name the memory space"});
  const auto view =
      lease.view<const float**, Kokkos::LayoutRight, Kokkos::HostSpace>(toy.weight[0]);
  EXPECT_EQ(view(0, 1), static_cast<float>(toy.initial(toy.weight[0], 1)));
}

TEST(DeviceRefusalTest, InstanceOfTheHostIsNamed) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  engine.begin_evaluation();
  const Kokkos::DefaultHostExecutionSpace host;

  expect_error<ArgumentError>([&] { (void)engine.gather(toy.units[0], host); },
                              {"instance", "device memory", "of the host"});
  Config config = toy_config();
  config.memory = Memory::device;
  expect_error<ArgumentError>([&] { Engine(MPI_COMM_WORLD, toy.model, config, host); },
                              {"instance", "device memory", "of the host"});
}

TEST(DeviceRefusalTest, RanksThatShareADeviceNeedLeave) {
  const Toy toy;
  Config config = toy_config();
  config.share_device = false;
  if (Kokkos::num_devices() >= job_size()) {
    EXPECT_NO_THROW(Engine(MPI_COMM_WORLD, toy.model, config));
    return;
  }
  expect_error<ConfigError>([&] { Engine(MPI_COMM_WORLD, toy.model, config); },
                            {"device of rank", "one device a rank", "uses too", "share_device"});
  config.share_device = true;
  config.nccl = Switch::on;
  expect_error<ConfigError>([&] { Engine(MPI_COMM_WORLD, toy.model, config); },
                            {"nccl", "ranks share a device", "auto"});
}

TEST(DeviceRefusalTest, PlanLargerThanTheDeviceIsRefusedOnEveryRank) {
  // The same model on all ranks, whose devices may differ.
  std::int64_t free = device::capacity().free;
  MPI_Allreduce(MPI_IN_PLACE, &free, 1, MPI_INT64_T, MPI_MAX, MPI_COMM_WORLD);
  Model model;
  (void)model.parameter(model.unit("unit"), "weight", {free / 4 + 1});
  Config config = toy_config();
  config.preset = Preset::ddp;

  expect_error<ConfigError>([&] { Engine(MPI_COMM_WORLD, model, config); },
                            {"device memory of rank", "bytes free", "shard size"});
  EXPECT_GT(device::capacity().free, free / 2) << "something was allocated";
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  EXPECT_FALSE(toy_step(engine, toy, 1).skipped) << "the device goes on";
}

// -- memory

/// Bytes of the device that are taken, by any process, once all ranks are here.
std::int64_t used() {
  Kokkos::fence();
  MPI_Barrier(MPI_COMM_WORLD);
  const device::Capacity capacity = device::capacity();
  MPI_Barrier(MPI_COMM_WORLD);
  return capacity.total - capacity.free;
}

// Nobody else may use the device meanwhile, and every rank has its own.
TEST(DeviceMemoryTest, ArenaIsThePlansAndNothingElseGrowsWithTheModel) {
  if (Kokkos::num_devices() < job_size()) {
    GTEST_SKIP() << "ranks share a device: its memory says nothing about one of them";
  }
  for (const Layout& layout : layouts_of_job()) {
    SCOPED_TRACE(layout.text());
    Config config;
    layout.apply(config);
    config.compute = DType::bf16;
    const KernelClient small(100);
    const auto trained = [&](const KernelClient& client) {
      auto engine = std::make_unique<Engine>(MPI_COMM_WORLD, client.model, config);
      EXPECT_EQ(engine->arena_bytes(), engine->plan().memory().arena);
      return engine;
    };
    // The run-time library and NCCL take memory once, and for each engine.
    auto first = trained(small);
    for (int i = 0; i < 3; ++i) (void)small.step(*first).get();
    const std::int64_t before = used();
    auto second = trained(small);
    for (int i = 0; i < 3; ++i) (void)small.step(*second).get();
    const std::int64_t overhead = used() - before - second->arena_bytes();
    second.reset();
    const KernelClient large(std::int64_t{32} << 20);

    auto engine = trained(large);
    std::int64_t peak = 0;
    for (int i = 0; i < 6; ++i) {
      (void)large.step(*engine).get();
      peak = std::max(peak, used() - before);
    }

    const std::int64_t expected = engine->arena_bytes() + overhead;
    EXPECT_LE(static_cast<double>(peak), 1.05 * static_cast<double>(expected))
        << "arena " << engine->arena_bytes() << ", overhead " << overhead;
    EXPECT_GE(peak, engine->arena_bytes());
    if (job_rank() == 0) {
      std::printf("%s: arena %.1f MiB, overhead of an engine %.1f MiB, peak %.1f MiB\n",
                  layout.text().c_str(), static_cast<double>(engine->arena_bytes()) / (1 << 20),
                  static_cast<double>(overhead) / (1 << 20), static_cast<double>(peak) / (1 << 20));
    }
  }
}

}  // namespace
}  // namespace mics::test
