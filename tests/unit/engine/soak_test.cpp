// SPDX-License-Identifier: Apache-2.0
// Long runs leave memory, threads and files as they were. MICS_SOAK_STEPS steps (default 300) and
// MICS_SOAK_STARTS engines (default 8).
#include "communicator_count.hpp"
#include "kernel_client.hpp"
#include "layouts.hpp"
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>
#include <mpi.h>
#include <unistd.h>
#include <unit/pitfalls/pitfall.hpp>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace mics::test {
namespace {

constexpr std::int64_t mib = std::int64_t{1} << 20;

int from_environment(const char* name, int otherwise) {
  const char* const text = std::getenv(name);
  return text == nullptr ? otherwise : std::atoi(text);
}

/// What this process, and on a device all processes that use it, hold.
struct Footprint {
  std::int64_t resident = 0;
  std::int64_t device = 0;
  std::int64_t threads = 0;
  std::int64_t files = 0;

  /// Collective over the job.
  static Footprint now() {
    namespace fs = std::filesystem;
    Kokkos::fence();
    MPI_Barrier(MPI_COMM_WORLD);
    Footprint found;
    std::int64_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages >> found.resident;
    found.resident *= sysconf(_SC_PAGESIZE);
    if (device::separate) {
      const device::Capacity capacity = device::capacity();
      found.device = capacity.total - capacity.free;
    }
    const auto entries = [](const char* folder) {
      return std::distance(fs::directory_iterator(folder), fs::directory_iterator());
    };
    found.threads = entries("/proc/self/task");
    found.files = entries("/proc/self/fd");
    MPI_Barrier(MPI_COMM_WORLD);
    return found;
  }
};

void expect_as(const Footprint& before, const Footprint& after, std::int64_t resident_growth) {
  if (job_rank() == 0) {
    std::printf("host memory %+.2f MiB, device memory %+.2f MiB, %lld threads, %lld files\n",
                static_cast<double>(after.resident - before.resident) / mib,
                static_cast<double>(after.device - before.device) / mib,
                static_cast<long long>(after.threads), static_cast<long long>(after.files));
  }
  EXPECT_LE(after.resident - before.resident, resident_growth) << "bytes of host memory";
  EXPECT_LE(after.device, before.device) << "bytes of the device's memory";
  EXPECT_LE(after.threads, before.threads);
  EXPECT_LE(after.files, before.files);
}

TEST(SoakTest, StepsLeaveMemoryAsItIsAndReplicasEqual) {
  const int steps = from_environment("MICS_SOAK_STEPS", 300);
  const KernelClient client(300);
  for (const Preset preset : {Preset::ddp, Preset::zero3}) {
    SCOPED_TRACE(name(preset));
    Config config;
    config.preset = preset;
    config.compute = DType::bf16;
    config.gradient_clipping = 1;
    config.loss_scale = {.dynamic = true, .initial = 16, .window = 100};
    config.replica_check_every = steps / 10;
    apply_memory(config);
    Engine engine(MPI_COMM_WORLD, client.model, config);
    const auto run = [&](int count) {
      for (int i = 0; i < count; ++i) (void)client.step(engine);
      engine.quiet({});
    };
    run(steps / 10);
    const Footprint before = Footprint::now();
    const auto early = state_of(engine);

    run(steps - steps / 10);

    expect_as(before, Footprint::now(), 4 * mib);
    const auto state = state_of(engine, {"compute", "master_weights", "exp_avg", "exp_avg_sq"});
    expect_same_on_all_ranks(state, "state");
    EXPECT_NE(state_of(engine), early) << "a run that does nothing";
    EXPECT_EQ(client.step(engine).get().step, steps + 1);
  }
}

TEST(SoakTest, StartsAndStopsLeaveNothingBehind) {
  const int starts = from_environment("MICS_SOAK_STARTS", 8);
  const KernelClient client(300);
  const auto start = [&](int number) {
    Config config;
    config.preset = number % 2 == 0 ? Preset::zero3 : Preset::ddp;
    apply_memory(config);
    Engine engine(MPI_COMM_WORLD, client.model, config);
    (void)client.step(engine);
    EXPECT_FALSE(client.step(engine).get().skipped);
  };
  for (int i = 0; i < 4; ++i) start(i);
  const Footprint before = Footprint::now();
  const int communicators_before = communicators;

  for (int i = 0; i < starts; ++i) start(i);

  expect_as(before, Footprint::now(), 16 * mib);
  EXPECT_EQ(communicators, communicators_before);
}

}  // namespace
}  // namespace mics::test
