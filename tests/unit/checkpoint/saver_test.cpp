// SPDX-License-Identifier: Apache-2.0
#include "stored_model.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/shared_read.hpp>
#include <mics/checkpoint/loader.hpp>
#include <mics/checkpoint/saver.hpp>
#include <mics/comm/communicator.hpp>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cerrno>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mics::checkpoint::test {
namespace {

class SaverTest : public testing::Test {
 protected:
  SaverTest() {
    // Rank 0's folder is everyone's.
    std::string path;
    if (world_.rank() == 0) {
      scratch_.emplace();
      path = scratch_->path().string();
    }
    path.resize(4096);
    MPI_Bcast(path.data(), 4096, MPI_CHAR, 0, world_.native());
    directory_ = std::string(path.c_str()) + "/run";
  }
  ~SaverTest() override { MPI_Barrier(world_.native()); }

  // Each rank fills its own shard only.
  struct Rank {
    Rank(const comm::Communicator& world, const Placement& placement, std::int64_t step,
         const Model& model = odd_model())
        : state(describe(model, placement)), memory(state) {
      state.step = step;
      const std::vector<int> nodes(static_cast<std::size_t>(world.size()), 0);
      place = layout::GroupLayout::make(nodes, placement.shard).place(world.rank());
    }
    auto sources() { return memory.parts<const std::byte>(place.shard, place.group, slices()); }
    auto targets() { return memory.parts<std::byte>(place.shard, place.group, slices()); }
    [[nodiscard]] int slices() const { return state.grid.slices; }
    StoredState state;
    Memory memory;
    layout::Place place;
  };

  std::vector<Placement> placements() const {
    std::vector<Placement> result;
    for (int p = 1; p <= world_.size(); ++p) {
      if (world_.size() % p != 0) continue;
      result.push_back({world_.size(), p});
      if (p < world_.size()) result.push_back({world_.size(), p, true});
    }
    return result;
  }

  // Equal on this rank's part of every array.
  static void expect_filled(Rank& rank) {
    Memory expected(rank.state);
    expected.fill();
    const auto want = expected.parts<std::byte>(rank.place.shard, rank.place.group, rank.slices());
    const auto have = rank.targets();
    for (std::size_t i = 0; i < want.size(); ++i) {
      const DType dtype =
          rank.state.buffer(want[i].buffer).arrays[static_cast<std::size_t>(want[i].array)].dtype;
      EXPECT_EQ(std::memcmp(want[i].data, have[i].data,
                            static_cast<std::size_t>(want[i].range.length * bytes_of(dtype))),
                0)
          << "array " << i;
    }
  }

  std::optional<Checkpoint> load_into(Rank& rank, std::optional<std::int64_t> step = {},
                                      SystemCalls& calls = SystemCalls::native()) {
    const comm::Communicator replicas = world_.split(rank.place.shard, rank.place.group);
    return load(
        group_, directory_, rank.state, rank.place, rank.targets(),
        [&](void* data, std::int64_t bytes, int root) {
          MPI_Bcast(data, static_cast<int>(bytes), MPI_BYTE, root, replicas.native());
        },
        step, log_, calls);
  }

  comm::Communicator world_ = comm::Communicator::duplicate(MPI_COMM_WORLD);
  comm::FailureChannel failures_{world_};
  comm::OperationLog operations_;
  comm::MpiTransport group_{comm::Communicator::duplicate(world_.native()),
                            std::vector<int>(static_cast<std::size_t>(world_.size())),
                            {&failures_, &operations_}};
  std::optional<ScratchFolder> scratch_;
  std::filesystem::path directory_;
  std::vector<std::string> warnings_;
  std::vector<std::string> information_;
  LogSink log_ = [this](LogLevel level, std::string_view line) {
    (level == LogLevel::information ? information_ : warnings_).emplace_back(line);
  };
};

TEST_F(SaverTest, EveryPlacementLoadsWhatEveryOtherSaved) {
  Saver saver(group_, directory_, {.retention = {.keep = 2}, .size = {.min_bytes = 0}}, log_);
  std::int64_t step = 0;
  std::optional<std::uint32_t> digest;
  for (const Placement& from : placements()) {
    Rank writer(world_, from, ++step);
    writer.memory.fill();
    saver.save(writer.state, writer.place, writer.sources());
    for (const Placement& to : placements()) {
      Rank reader(world_, to, 0);
      const auto checkpoint = load_into(reader);
      ASSERT_TRUE(checkpoint);
      EXPECT_EQ(checkpoint->state().step, step);
      if (!digest) digest = checkpoint->commit().digest;
      EXPECT_EQ(checkpoint->commit().digest, *digest);
      expect_filled(reader);
    }
  }
  EXPECT_LE(list_steps(directory_).size(), 2U);
  EXPECT_TRUE(warnings_.empty());
}

// Batches so small that arrays are cut and sent in several.
TEST_F(SaverTest, ReplicasSendEachOtherWhatTheyReadBatchByBatch) {
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_);
  Rank writer(world_, {world_.size(), 1}, 3);
  writer.memory.fill();
  saver.save(writer.state, writer.place, writer.sources());
  const Checkpoint checkpoint = Checkpoint::open(SystemCalls::native(), directory_ / step_name(3));
  for (const Placement& to : placements()) {
    Rank reader(world_, to, 0);
    const comm::Communicator replicas = world_.split(reader.place.shard, reader.place.group);
    const auto read = [&](std::int64_t batch_bytes, int& broadcasts) {
      for (auto& array : reader.memory.arrays())
        std::fill(array.begin(), array.end(), std::byte{7});
      return detail::read_shared(
          group_, checkpoint, reader.state, reader.place, reader.targets(),
          [&](void* data, std::int64_t bytes, int root) {
            ++broadcasts;
            MPI_Bcast(data, static_cast<int>(bytes), MPI_BYTE, root, replicas.native());
          },
          batch_bytes);
    };
    int at_once = 0;
    static_cast<void>(read(std::int64_t{1} << 30, at_once));
    int in_batches = 0;
    const std::vector<ReadSum> sums = read(256, in_batches);
    if (to.replicas() == 1) {
      EXPECT_EQ(in_batches, 0);
    } else if (to.shard == 1 && !to.over_world) {
      EXPECT_GT(in_batches, at_once);
    }
    expect_filled(reader);
    // What it summed is what lies there.
    for (const ReadSum& sum : sums) {
      const auto held = reader.targets();
      const auto in = std::find_if(held.begin(), held.end(), [&](const Target& part) {
        return part.buffer == sum.buffer && part.array == sum.array &&
               intersection(part.range, sum.range) == sum.range;
      });
      ASSERT_NE(in, held.end());
      const std::int64_t width = bytes_of(
          reader.state.buffer(sum.buffer).arrays[static_cast<std::size_t>(sum.array)].dtype);
      EXPECT_EQ(sum.crc, crc32c({in->data + (sum.range.offset - in->range.offset) * width,
                                 static_cast<std::size_t>(sum.range.length * width)}));
    }
  }
}

TEST_F(SaverTest, AReadThatFailsOnOneRankEndsOnAll) {
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_);
  Rank writer(world_, {world_.size(), 1}, 3);
  writer.memory.fill();
  saver.save(writer.state, writer.place, writer.sources());
  class FailingReads : public SystemCalls {
   public:
    explicit FailingReads(bool fails) : fails_(fails) {}
    ssize_t pread(int descriptor, void* data, std::size_t bytes, off_t offset) override {
      if (fails_) {
        errno = EIO;
        return -1;
      }
      return SystemCalls::pread(descriptor, data, bytes, offset);
    }

   private:
    bool fails_;
  };
  FailingReads calls(world_.rank() == world_.size() - 1);
  Rank reader(world_, {world_.size(), 1}, 0);
  const std::filesystem::path folder = directory_ / step_name(3);
  const Checkpoint checkpoint =
      Checkpoint::receive(calls, folder, Checkpoint::fetch(SystemCalls::native(), folder));
  std::string text;
  try {
    static_cast<void>(detail::read_shared(
        group_, checkpoint, reader.state, reader.place, reader.targets(),
        [](void*, std::int64_t, int) {}, 700));
  } catch (const IoError& error) {
    text = error.what();
  }
  EXPECT_NE(text.find("Input/output error"), std::string::npos) << text;
  // The ranks are in step: the next read succeeds.
  ASSERT_TRUE(load_into(reader));
  expect_filled(reader);
}

TEST_F(SaverTest, AFileSystemWithoutDirectInputAndOutputIsNamedOnce) {
  class NoDirect : public SystemCalls {
    int open(const char* path, int flags, mode_t mode) override {
      if ((flags & O_DIRECT) == 0) return SystemCalls::open(path, flags, mode);
      errno = EINVAL;
      return -1;
    }
  } calls;
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_, calls);
  Rank writer(world_, {world_.size(), 1}, 3);
  writer.memory.fill();
  for (writer.state.step = 3; writer.state.step < 5; ++writer.state.step) {
    saver.save(writer.state, writer.place, writer.sources());
  }
  if (world_.rank() == 0) {
    ASSERT_EQ(information_.size(), 1U);
    EXPECT_NE(information_[0].find("through the page cache"), std::string::npos);
    EXPECT_NE(information_[0].find(directory_.string()), std::string::npos);
  } else {
    EXPECT_TRUE(information_.empty());
  }
  Rank reader(world_, {world_.size(), 1}, 0);
  ASSERT_TRUE(load_into(reader));
  expect_filled(reader);
  EXPECT_TRUE(warnings_.empty());
}

TEST_F(SaverTest, WhatWasStagedIsSavedWhateverComesAfter) {
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_);
  Rank rank(world_, {world_.size(), 1}, 5);
  rank.memory.fill();
  saver.start(rank.state, rank.place, rank.sources());
  EXPECT_TRUE(saver.under_way());
  for (auto& array : rank.memory.arrays()) std::fill(array.begin(), array.end(), std::byte{0x55});
  SaveProgress progress = saver.poll();
  while (progress.phase == SavePhase::staged) progress = saver.poll();
  EXPECT_EQ(progress.phase, SavePhase::committed) << progress.error;
  EXPECT_EQ(progress.folder, directory_ / step_name(5));
  EXPECT_EQ(saver.poll().phase, SavePhase::none);
  Rank reader(world_, {world_.size(), world_.size()}, 0);
  ASSERT_TRUE(load_into(reader, 5));
  expect_filled(reader);
}

// Arrays of some blocks of the checksum, cut between replicas anywhere; two arrays whose memory is
// the same.
TEST_F(SaverTest, WhatIsStagedIsCutAtBlocksAndMayLieInTheSameMemory) {
  Model model;
  const UnitId unit = model.unit("unit");
  model.parameter(unit, "matrix", {300, 1003});
  model.parameter(unit, "vector", {77});
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_);
  std::int64_t step = 0;
  for (const Placement& placement : placements()) {
    Rank rank(world_, placement, ++step, model);
    rank.memory.fill();
    Memory filled(rank.memory);
    auto sources = rank.sources();
    ASSERT_EQ(sources.size(), 3U);
    sources[1].data = sources[2].data;
    saver.start(rank.state, rank.place, sources);
    for (auto& array : rank.memory.arrays()) std::fill(array.begin(), array.end(), std::byte{0x55});
    ASSERT_EQ(saver.wait().phase, SavePhase::committed);

    Rank reader(world_, placement, 0, model);
    ASSERT_TRUE(load_into(reader, step));
    const auto parts = reader.targets();
    const auto want =
        filled.parts<std::byte>(reader.place.shard, reader.place.group, reader.slices());
    for (const auto& [array, expected] : {std::pair{0, 0}, {1, 2}, {2, 2}}) {
      const auto i = static_cast<std::size_t>(array);
      EXPECT_EQ(std::memcmp(want[static_cast<std::size_t>(expected)].data, parts[i].data,
                            static_cast<std::size_t>(parts[i].range.length) * sizeof(float)),
                0)
          << "array " << array << ", shards of " << placement.shard;
    }
  }
}

TEST_F(SaverTest, ReplicasThatDifferAreNotSaved) {
  if (world_.size() == 1) return;  // it has no replica
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_);
  Rank rank(world_, {world_.size(), 1}, 5);
  rank.memory.fill();
  const int odd = world_.size() - 1;
  if (world_.rank() == odd) rank.memory.arrays()[0][7] ^= std::byte{1};
  try {
    saver.save(rank.state, rank.place, rank.sources());
    ADD_FAILURE() << "it was saved";
  } catch (const FormatError& error) {
    const std::string line = error.what();
    EXPECT_NE(line.find("shard 0 of step 5"), std::string::npos) << line;
    EXPECT_NE(line.find("others on rank " + std::to_string(odd)), std::string::npos) << line;
  }
  EXPECT_TRUE(list_steps(directory_).empty());
  if (world_.rank() == odd) rank.memory.arrays()[0][7] ^= std::byte{1};
  saver.save(rank.state, rank.place, rank.sources());
  EXPECT_EQ(list_steps(directory_), std::vector<std::int64_t>{5});
}

// Fails writes of one rank.
class FullDisk : public SystemCalls {
 public:
  bool full = false;
  ssize_t pwrite(int descriptor, const void* data, std::size_t bytes, off_t offset) override {
    if (!full) return SystemCalls::pwrite(descriptor, data, bytes, offset);
    errno = ENOSPC;
    return -1;
  }
};

TEST_F(SaverTest, AFullDiskOfOneRankIsAnErrorOfAllAndTheNextSaveWorks) {
  FullDisk calls;
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_, calls);
  Rank rank(world_, {world_.size(), world_.size()}, 5);
  rank.memory.fill();
  saver.save(rank.state, rank.place, rank.sources());
  rank.state.step = 6;
  calls.full = world_.rank() == world_.size() - 1;
  EXPECT_THROW(saver.save(rank.state, rank.place, rank.sources()), IoError);
  saver.start(rank.state, rank.place, rank.sources());
  SaveProgress progress = saver.poll();
  while (progress.phase == SavePhase::staged) progress = saver.poll();
  EXPECT_EQ(progress.phase, SavePhase::failed);
  EXPECT_NE(progress.error.find("No space left"), std::string::npos) << progress.error;
  calls.full = false;
  Rank reader(world_, {world_.size(), 1}, 0);
  EXPECT_EQ(load_into(reader)->state().step, 5);
  saver.save(rank.state, rank.place, rank.sources());
  EXPECT_EQ(load_into(reader)->state().step, 6);
}

TEST_F(SaverTest, ADamagedStepGivesWayToTheOneBefore) {
  Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_);
  Rank rank(world_, {world_.size(), world_.size()}, 1);
  rank.memory.fill();
  saver.save(rank.state, rank.place, rank.sources());
  rank.state.step = 2;
  saver.save(rank.state, rank.place, rank.sources());
  std::string damaged;
  if (world_.rank() == 0) {
    const Checkpoint newest = Checkpoint::open(SystemCalls::native(), directory_ / step_name(2));
    damaged = newest.commit().files[1].name;  // later shards may be all padding, which nobody reads
    std::FILE* file = std::fopen((newest.folder() / damaged).c_str(), "r+b");
    std::fseek(file, -100, SEEK_END);
    std::fputc(0x5a, file);
    std::fclose(file);
  }
  MPI_Barrier(world_.native());
  Rank reader(world_, {world_.size(), 1}, 0);
  const auto checkpoint = load_into(reader);
  ASSERT_TRUE(checkpoint);
  EXPECT_EQ(checkpoint->state().step, 1);
  expect_filled(reader);
  if (world_.rank() == 0) {
    ASSERT_EQ(warnings_.size(), 1U);
    EXPECT_NE(warnings_[0].find(damaged), std::string::npos) << warnings_[0];
  }
  EXPECT_THROW(static_cast<void>(load_into(reader, 2)), FormatError);
  EXPECT_THROW(static_cast<void>(load_into(reader, 3)), IoError);
}

// What another job does to the directory, just before a file whose path ends so is first opened.
class Meanwhile : public SystemCalls {
 public:
  Meanwhile(std::string at, std::function<void()> what)
      : at_(std::move(at)), what_(std::move(what)) {}
  int open(const char* path, int flags, mode_t mode) override {
    if (what_ && std::string_view(path).ends_with(at_)) std::exchange(what_, {})();
    return SystemCalls::open(path, flags, mode);
  }

 private:
  std::string at_;
  std::function<void()> what_;
};

// Fails if an older step is taken, with a warning of damage, where a job has a newer one.
TEST_F(SaverTest, AStepThatIsRemovedOrReplacedMeanwhileGivesWayToTheNewest) {
  const std::filesystem::path run = directory_;
  for (const bool replaced : {false, true}) {
    for (const char* const kind : {"COMMIT", "manifest.h5", "piece"}) {
      SCOPED_TRACE(std::string(replaced ? "replaced at " : "removed at ") + kind);
      directory_ = run.string() + kind + (replaced ? "1" : "0");
      const auto save_step = [&](const std::filesystem::path& to, std::int64_t step) {
        Saver saver(group_, to, {.size = {.min_bytes = 0}}, log_);
        Rank rank(world_, {world_.size(), world_.size()}, step);
        rank.memory.fill();
        saver.save(rank.state, rank.place, rank.sources());
      };
      for (const std::int64_t step : {1, 2}) save_step(directory_, step);
      // What the other job has when it is done.
      const std::filesystem::path other = directory_.string() + "_other";
      const std::int64_t newest = replaced ? 2 : 3;
      save_step(other, newest);
      std::optional<Meanwhile> calls;
      std::string id;
      if (world_.rank() == 0) {
        const std::filesystem::path step = directory_ / step_name(2);
        id = Checkpoint::open(SystemCalls::native(), other / step_name(newest)).commit().id;
        const std::string piece =
            Checkpoint::open(SystemCalls::native(), step).commit().files[1].name;
        const std::string file = std::string_view(kind) == "piece" ? piece : kind;
        calls.emplace(step_name(2) + '/' + file, [=, this] {
          std::filesystem::rename(step, other / ".trash");
          std::filesystem::rename(other / step_name(newest), directory_ / step_name(newest));
        });
      }
      MPI_Barrier(world_.native());

      Rank reader(world_, {world_.size(), 1}, 0);
      warnings_.clear();
      const auto checkpoint =
          load_into(reader, {}, calls ? static_cast<SystemCalls&>(*calls) : SystemCalls::native());

      ASSERT_TRUE(checkpoint);
      EXPECT_EQ(checkpoint->state().step, newest);
      if (!id.empty()) {
        EXPECT_EQ(checkpoint->commit().id, id);
      }
      EXPECT_EQ(warnings_, std::vector<std::string>());
      expect_filled(reader);
    }
  }
}

// The load fails, and does not say that there was nothing to load.
TEST_F(SaverTest, ADirectoryThatVanishesWhileItIsReadIsAnError) {
  {
    Saver saver(group_, directory_, {.size = {.min_bytes = 0}}, log_);
    Rank rank(world_, {world_.size(), world_.size()}, 1);
    saver.save(rank.state, rank.place, rank.sources());
  }
  Meanwhile calls("manifest.h5", [&] { std::filesystem::remove_all(directory_); });
  Rank reader(world_, {world_.size(), 1}, 0);
  EXPECT_THROW(static_cast<void>(load_into(reader, {}, calls)), IoError);
}

}  // namespace
}  // namespace mics::checkpoint::test
