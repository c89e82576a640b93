// SPDX-License-Identifier: Apache-2.0
// What saving, loading and rewriting take beside a state of hundreds of MB, and how often its bytes
// are read.
#include "layouts.hpp"
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/reshard.hpp>
#include <mics/mics.hpp>
#include <support/shared_folder.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

namespace mics::test {
namespace {

constexpr std::int64_t mib = std::int64_t{1} << 20;
constexpr std::int64_t io_buffers = 2 * 8 * mib;
// Manifest, descriptions, stacks of the threads that read and write, messages.
constexpr std::int64_t small_change = 8 * mib;

std::int64_t number_in(const char* file, const std::string& key) {
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    if (line.starts_with(key)) return std::stoll(line.substr(key.size()));
  }
  ADD_FAILURE() << file << " has no " << key;
  return 0;
}

/// How far this process's memory grew above what it was, at most.
class PeakMemory {
 public:
  PeakMemory() {
    std::ofstream reset("/proc/self/clear_refs");
    reset << 5 << std::flush;
    EXPECT_TRUE(reset.good()) << "the kernel does not forget the peak";
    before_ = number_in("/proc/self/status", "VmRSS:") * 1024;
  }
  [[nodiscard]] std::int64_t growth() const {
    return number_in("/proc/self/status", "VmHWM:") * 1024 - before_;
  }

 private:
  std::int64_t before_ = 0;
};

/// Bytes that this process has read by system calls.
std::int64_t bytes_read() { return number_in("/proc/self/io", "rchar:"); }

std::int64_t sum_over_ranks(std::int64_t value) {
  std::int64_t sum = 0;
  MPI_Allreduce(&value, &sum, 1, MPI_INT64_T, MPI_SUM, MPI_COMM_WORLD);
  return sum;
}

/// Four units: 16 Mi elements, 192 MiB of master weights and moments.
constexpr std::int64_t units = 4;
constexpr std::int64_t elements = 4 * mib;
constexpr std::int64_t state_bytes = units * elements * 12;

Model large_model() {
  Model model;
  for (std::int64_t u = 0; u < units; ++u) {
    (void)model.parameter(model.unit("unit" + std::to_string(u)), "weight", {elements / 1024, 1024},
                          {.init = Init::constant(0.5)});
  }
  return model;
}

Config config_of(Preset preset, int p) {
  Config config;
  config.preset = preset;
  config.shard_size = preset == Preset::mics ? p : 0;
  config.compute = DType::bf16;
  return config;
}

/// Touches every byte of the engine's memory, and MPI's.
void take_step(Engine& engine) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (int u = units; u-- > 0;) {
    const Lease lease = engine.gather({u});
    auto scope = engine.gradient({u});
    const auto view = scope.view<bf16**>(engine.model().parameters({u}).front());
    view(1, 2) = bf16(1.0F + static_cast<float>(engine.rank()));
    scope.reduce();
  }
  (void)engine.step();
}

TEST(LoadMemory, LoadingStaysWithinHalfOfTheRanksStateAndReadsEachByteOnce) {
  const Model model = large_model();
  const SharedFolder folder;
  const std::string directory = folder.in("run");
  std::int64_t file_bytes = 0;
  std::uint32_t digest = 0;
  {
    Engine engine(MPI_COMM_WORLD, model, config_of(Preset::mics, 2));
    take_step(engine);
    engine.save(directory);
    const auto checkpoint =
        checkpoint::Checkpoint::open(checkpoint::SystemCalls::native(),
                                     std::filesystem::path(directory) / checkpoint::step_name(1));
    for (const auto& file : checkpoint.commit().files) file_bytes += file.bytes;
    digest = checkpoint.commit().digest;
  }
  EXPECT_GE(file_bytes, state_bytes);
  EXPECT_LE(file_bytes, state_bytes + 2 * mib);

  struct Case {
    Preset preset;
    int p;
    bool forward_only;
  };
  for (const Case& to : {Case{Preset::mics, 2, false}, Case{Preset::zero3, 4, false},
                         Case{Preset::ddp, 1, false}, Case{Preset::ddp, 1, true}}) {
    SCOPED_TRACE(std::string(name(to.preset)) + (to.forward_only ? " forward only" : ""));
    Config config = config_of(to.preset, to.p);
    config.forward_only = to.forward_only;
    config.seed = 99;
    Engine engine(MPI_COMM_WORLD, model, config);
    if (!to.forward_only) take_step(engine);
    MPI_Barrier(MPI_COMM_WORLD);
    const std::int64_t read_before = bytes_read();
    const PeakMemory memory;

    const auto loaded = engine.load(directory);

    const std::int64_t growth = memory.growth();
    const std::int64_t read = sum_over_ranks(bytes_read() - read_before);
    ASSERT_TRUE(loaded.has_value());
    EXPECT_EQ(loaded->digest, digest);
    EXPECT_LE(growth, io_buffers + small_change);
    const std::int64_t own = to.forward_only ? units * elements * 2 : state_bytes / to.p;
    EXPECT_LE(growth, own / 2) << "of a state of " << own;

    // Where another rank's part begins within a MiB, both read it: they verify it whole.
    const std::int64_t wanted = to.forward_only ? units * elements * 4 : state_bytes;
    const std::int64_t arrays = to.forward_only ? 1 : 3;
    const bool same = to.p == 2 && to.preset == Preset::mics;
    const std::int64_t borders = same ? 0 : job_size() * units * arrays * 2;
    EXPECT_GE(read, wanted);
    EXPECT_LE(read, wanted + borders * mib + 2 * mib);
    if (job_rank() == 0) {
      std::printf(
          "%s%s: rank 0 grew by %.1f MiB beside %.0f MiB of state; all ranks read %.1f MiB "
          "of %.1f\n",
          std::string(name(to.preset)).c_str(), to.forward_only ? ", forward only" : "",
          static_cast<double>(growth) / mib, static_cast<double>(own) / mib,
          static_cast<double>(read) / mib, static_cast<double>(wanted) / mib);
    }
  }
}

TEST(LoadMemory, SavingStagesNoMoreThanWhatTheRankWrites) {
  const Model model = large_model();
  const SharedFolder folder;
  for (const int p : {1, 2, 4}) {
    for (const bool asynchronous : {false, true}) {
      SCOPED_TRACE("p=" + std::to_string(p) + (asynchronous ? ", asynchronous" : ""));
      Engine engine(MPI_COMM_WORLD, model, config_of(Preset::mics, p));
      take_step(engine);
      MPI_Barrier(MPI_COMM_WORLD);
      const PeakMemory memory;

      engine.save(folder.in("run"), {.asynchronous = asynchronous});
      engine.wait_for_save();

      const std::int64_t growth = memory.growth();
      const std::int64_t slice = asynchronous ? state_bytes / job_size() : 0;
      EXPECT_LE(growth, slice + io_buffers + small_change);
      if (job_rank() == 0) {
        std::printf("p=%d%s: rank 0 grew by %.1f MiB, %.1f MiB of them its slice\n", p,
                    asynchronous ? ", asynchronous" : "", static_cast<double>(growth) / mib,
                    static_cast<double>(slice) / mib);
      }
    }
  }
}

TEST(LoadMemory, RewritingTakesAWindowWhateverTheState) {
  const Model model = large_model();
  const SharedFolder folder;
  {
    Engine engine(MPI_COMM_WORLD, model, config_of(Preset::zero3, job_size()));
    take_step(engine);
    engine.save(folder.in("run"));
  }
  if (job_rank() == 0) {
    auto& calls = checkpoint::SystemCalls::native();
    const auto from = checkpoint::Checkpoint::open(
        calls, std::filesystem::path(folder.in("run")) / checkpoint::step_name(1));
    for (const int p : {1, 3}) {
      checkpoint::DirectoryWriter to(calls, folder.in("to" + std::to_string(p)), {});
      constexpr std::int64_t window = 32 * mib;
      const std::int64_t read_before = bytes_read();
      const PeakMemory memory;

      const auto result = reshard(
          calls, from, to, {.grid = {.world_size = p, .shard_size = p}, .window_bytes = window});

      const std::int64_t growth = memory.growth();
      const std::int64_t read = bytes_read() - read_before;
      EXPECT_EQ(result.commit.digest, from.commit().digest);
      EXPECT_LE(growth, window + 2 * io_buffers + small_change);
      // A small window of a small state: the MiB at its ends weigh more than they would in others.
      EXPECT_LE(read, state_bytes * 3 / 2);
      std::printf("to p=%d: grew by %.1f MiB, read %.1f MiB of %.1f\n", p,
                  static_cast<double>(growth) / mib, static_cast<double>(read) / mib,
                  static_cast<double>(state_bytes) / mib);
    }
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace
}  // namespace mics::test
