// SPDX-License-Identifier: Apache-2.0
#include "stored_model.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/reshard.hpp>
#include <mics/checkpoint/verify.hpp>

#include <gtest/gtest.h>

#include <cerrno>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

/// A step of the odd model in a directory of its own.
struct Saved {
  Saved(const std::filesystem::path& path, const Placement& placement)
      : state(describe(odd_model(), placement)), memory(state) {
    memory.fill();
    DirectoryWriter directory(SystemCalls::native(), path, {});
    folder = save(SystemCalls::native(), directory, state, memory);
  }
  StoredState state;
  Memory memory;
  std::filesystem::path folder;
};

Resharded rewrite(const Checkpoint& from, const std::filesystem::path& to,
                  const Reshaping& reshaping, SystemCalls& calls = SystemCalls::native()) {
  DirectoryWriter directory(calls, to, {});
  return reshard(calls, from, directory, reshaping);
}

/// What a rank of the grid loads is what was saved.
void expect_values(const Checkpoint& checkpoint, const Placement& placement) {
  const StoredState wanted = describe(odd_model(), placement);
  Memory expected(wanted);
  expected.fill();
  Memory loaded(wanted);
  for (int tau = 0; tau < placement.shard; ++tau) {
    for (int replica = 0; replica < placement.replicas(); ++replica) {
      checkpoint.read(wanted, loaded.parts<std::byte>(tau, replica, wanted.grid.slices));
    }
  }
  EXPECT_TRUE(loaded == expected);
}

// Fails if a piece is cut where the ranks of the new grid would not cut it, or an element of it
// comes from another place.
TEST(Reshard, IsWhatTheRanksOfTheNewGridWouldHaveSaved) {
  const ScratchFolder scratch;
  const std::vector<Placement> placements{{1, 1}, {3, 3}, {4, 2}, {4, 2, true}, {8, 4}};
  std::vector<std::unique_ptr<Saved>> natives;
  int number = 0;
  for (const Placement& placement : placements) {
    natives.push_back(
        std::make_unique<Saved>(scratch.path() / std::to_string(++number), placement));
  }
  for (std::size_t f = 0; f < placements.size(); ++f) {
    const Placement& from = placements[f];
    const Checkpoint checkpoint = Checkpoint::open(SystemCalls::native(), natives[f]->folder);
    for (std::size_t t = 0; t < placements.size(); ++t) {
      const Placement& to = placements[t];
      const Saved& native = *natives[t];
      SCOPED_TRACE(std::to_string(from.world) + '/' + std::to_string(from.shard) + " to " +
                   std::to_string(to.world) + '/' + std::to_string(to.shard));
      const Resharded result = rewrite(
          checkpoint, scratch.path() / std::to_string(++number),
          {.grid = native.state.grid, .size = {.min_bytes = 0}, .window_bytes = 1000 + number});

      EXPECT_EQ(result.converted, 0);
      EXPECT_EQ(result.commit.digest, checkpoint.commit().digest);
      EXPECT_EQ(verify(SystemCalls::native(), result.folder), std::vector<std::string>());
      const Checkpoint opened = Checkpoint::open(SystemCalls::native(), result.folder);
      const Checkpoint other = Checkpoint::open(SystemCalls::native(), native.folder);
      EXPECT_EQ(opened.state().tensors, native.state.tensors);
      EXPECT_EQ(opened.state().buffers, native.state.buffers);
      EXPECT_EQ(opened.state().grid, native.state.grid);
      EXPECT_EQ(opened.state().blobs, native.state.blobs);
      EXPECT_EQ(opened.state().values.texts, native.state.values.texts);
      EXPECT_EQ(opened.commit().files.size(), other.commit().files.size());
      for (std::size_t i = 1; i < opened.commit().files.size(); ++i) {
        EXPECT_EQ(opened.commit().files[i].bytes, other.commit().files[i].bytes);
      }
      expect_values(opened, to);
    }
  }
}

std::map<std::string, DType> dtypes_by_tensor(const StoredState& state) {
  std::map<std::string, DType> result;
  for (const StoredBuffer& buffer : state.buffers) {
    for (const StoredArray& array : buffer.arrays) {
      for (const StoredSegment& segment : buffer.segments) {
        result[array.name + ' ' + state.tensor(segment.tensor).name] = array.dtype;
      }
    }
  }
  return result;
}

TEST(Reshard, OtherComputeDtypesStoreWhatTheirEnginesWouldStore) {
  const ScratchFolder scratch;
  int number = 0;
  for (const DType before : {DType::fp64, DType::fp32, DType::bf16, DType::fp16}) {
    const Saved saved(scratch.path() / std::to_string(++number), {4, 2, false, 0, before});
    const Checkpoint checkpoint = Checkpoint::open(SystemCalls::native(), saved.folder);
    for (const DType after : {DType::fp64, DType::fp32, DType::bf16, DType::fp16}) {
      SCOPED_TRACE(std::string(name(before)) + " to " + std::string(name(after)));
      const StoredState wanted = describe(odd_model(), {3, 3, false, 0, after});
      const Resharded result =
          rewrite(checkpoint, scratch.path() / std::to_string(++number),
                  {.grid = wanted.grid, .compute = after, .window_bytes = 1 << 20});

      const Checkpoint opened = Checkpoint::open(SystemCalls::native(), result.folder);
      EXPECT_EQ(dtypes_by_tensor(opened.state()), dtypes_by_tensor(wanted));
      EXPECT_EQ(result.converted == 0, dtypes_by_tensor(saved.state) == dtypes_by_tensor(wanted));
      EXPECT_EQ(result.commit.digest == checkpoint.commit().digest, result.converted == 0);
      EXPECT_EQ(opened.state().values.texts.at("compute_dtype"), name(after));
      expect_values(opened, {2, 1, false, 0, after});
    }
  }
}

TEST(Reshard, WithoutTheDtypeThatItHadNoOtherIsMade) {
  const ScratchFolder scratch;
  StoredState state = describe(odd_model(), {2, 2});
  EXPECT_EQ(reshaped(state, state.grid, {}).buffers, state.buffers);
  state.values.texts.erase("compute_dtype");
  EXPECT_EQ(reshaped(state, state.grid, {}).buffers, state.buffers);
  EXPECT_THROW(static_cast<void>(reshaped(state, state.grid, DType::bf16)), FormatError);
  EXPECT_THROW(static_cast<void>(reshaped(state, {.world_size = 3, .shard_size = 2}, {})),
               FormatError);
}

// Fails at the n-th write.
class FailingWrite : public SystemCalls {
 public:
  int left = 0;
  ssize_t pwrite(int descriptor, const void* data, std::size_t bytes, off_t offset) override {
    if (left-- > 0) return SystemCalls::pwrite(descriptor, data, bytes, offset);
    errno = ENOSPC;
    return -1;
  }
};

TEST(Reshard, WhatIsDamagedOrDoesNotFitTheDiskCommitsNothing) {
  const ScratchFolder scratch;
  const Saved saved(scratch.path() / "from", {4, 2});
  const Checkpoint checkpoint = Checkpoint::open(SystemCalls::native(), saved.folder);
  const Reshaping reshaping{.grid = {.world_size = 3, .shard_size = 3}};
  const std::filesystem::path to = scratch.path() / "to";
  int failures = 0;
  for (int writes = 0;; ++writes) {
    FailingWrite calls;
    calls.left = writes + 1;  // the first is the lock's
    try {
      static_cast<void>(rewrite(checkpoint, to, reshaping, calls));
      break;
    } catch (const IoError&) {
      ++failures;
      EXPECT_TRUE(list_steps(to).empty());
      EXPECT_EQ(std::distance(std::filesystem::directory_iterator(to), {}), 1) << "beside the lock";
    }
  }
  EXPECT_EQ(failures, 3 + 2) << "pieces, manifest, COMMIT";
  EXPECT_EQ(list_steps(to), std::vector<std::int64_t>{12});

  const std::filesystem::path piece = saved.folder / checkpoint.commit().files[1].name;
  std::FILE* file = std::fopen(piece.c_str(), "r+b");
  ASSERT_NE(file, nullptr);
  std::fseek(file, -100, SEEK_END);
  std::fputc(0x5a, file);
  std::fclose(file);
  const std::filesystem::path third = scratch.path() / "third";
  EXPECT_THROW(static_cast<void>(rewrite(checkpoint, third, reshaping)), FormatError);
  EXPECT_TRUE(list_steps(third).empty());
}

}  // namespace
}  // namespace mics::checkpoint::test
