// SPDX-License-Identifier: Apache-2.0
#include "stored_model.hpp"
#include <mics/base/error.hpp>

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

std::vector<Placement> all_placements() {
  std::vector<Placement> placements;
  for (const int world : {1, 2, 3, 4, 5, 6, 8}) {
    for (int shard = 1; shard <= world; ++shard) {
      if (world % shard != 0) continue;
      placements.push_back({world, shard});
      if (shard < world) placements.push_back({world, shard, true});
    }
  }
  return placements;
}

std::string text(const Placement& p) {
  return std::to_string(p.world) + "/" + std::to_string(p.shard) + (p.over_world ? "w" : "");
}

TEST(Layouts, EveryLayoutLoadsIntoEveryOther) {
  const Model model = odd_model();
  SystemCalls& calls = SystemCalls::native();
  const std::vector<Placement> placements = all_placements();
  const ScratchFolder scratch;
  std::optional<std::uint32_t> digest;
  for (const Placement& from : placements) {
    const StoredState state = describe(model, from);
    Memory memory(state);
    memory.fill();
    std::filesystem::path folder;
    {
      DirectoryWriter directory(calls, scratch.path() / ("d" + text(from).substr(0, 1)), {});
      folder = save(calls, directory, state, memory);
    }
    const Checkpoint checkpoint = Checkpoint::open(calls, folder);
    if (!digest) digest = checkpoint.commit().digest;
    EXPECT_EQ(checkpoint.commit().digest, *digest) << text(from);
    for (const Placement& to : placements) {
      SCOPED_TRACE(text(from) + " to " + text(to));
      const StoredState wanted = describe(model, to);
      checkpoint.require_same_tensors(wanted);
      Memory expected(wanted);
      expected.fill();
      Memory loaded(wanted);
      for (int tau = 0; tau < to.shard; ++tau) {
        for (int replica = 0; replica < to.replicas(); ++replica) {
          const auto targets = loaded.parts<std::byte>(tau, replica, wanted.grid.slices);
          checkpoint.read(wanted, targets);
        }
      }
      ASSERT_TRUE(loaded == expected);
    }
  }
}

TEST(Layouts, OtherBuffersAndDtypesLoad) {
  const Model model = odd_model();
  SystemCalls& calls = SystemCalls::native();
  const ScratchFolder scratch;
  const StoredState state = describe(model, {4, 2});
  Memory memory(state);
  memory.fill();
  DirectoryWriter directory(calls, scratch.path(), {});
  const Checkpoint checkpoint = Checkpoint::open(calls, save(calls, directory, state, memory));
  for (const std::int64_t persistence : {0, 1, 64, 400, 5000}) {
    for (const DType dtype : {DType::fp64, DType::bf16}) {
      const StoredState wanted = describe(model, {3, 3, false, persistence, dtype});
      Memory expected(wanted);
      expected.fill();
      Memory loaded(wanted);
      for (int tau = 0; tau < 3; ++tau) {
        checkpoint.read(wanted, loaded.parts<std::byte>(tau, 0, 1));
      }
      EXPECT_TRUE(loaded == expected) << persistence << ' ' << name(dtype);
    }
  }
}

TEST(Layouts, SameLayoutReadsItsOwnPiecesOnly) {
  Model model;
  model.parameter(model.unit("layer"), "weight", {3000, 1000});
  SystemCalls& calls = SystemCalls::native();
  const ScratchFolder scratch;
  const StoredState state = describe(model, {6, 3});
  Memory memory(state);
  memory.fill();
  DirectoryWriter directory(calls, scratch.path(), {});
  const Checkpoint checkpoint = Checkpoint::open(calls, save(calls, directory, state, memory));
  EXPECT_EQ(checkpoint.parts(), 2);
  Memory loaded(state);
  const ReadCount own = checkpoint.read(state, loaded.parts<std::byte>(1, 0, 1));
  EXPECT_EQ(own.files, 2);
  EXPECT_LE(own.bytes, 3 * 4 * 1000256 + 2 * 65536 + (1 << 20));
}

TEST(Layouts, ValuesAndBlobsComeBack) {
  SystemCalls& calls = SystemCalls::native();
  const ScratchFolder scratch;
  const StoredState state = describe(odd_model(), {2, 2});
  Memory memory(state);
  memory.fill();
  DirectoryWriter directory(calls, scratch.path(), {});
  const std::filesystem::path step = save(calls, directory, state, memory);
  const Checkpoint checkpoint = Checkpoint::receive(calls, step, Checkpoint::fetch(calls, step));
  EXPECT_EQ(checkpoint.state().values.integers, state.values.integers);
  EXPECT_EQ(checkpoint.state().values.texts, state.values.texts);
  const auto& reals = checkpoint.state().values.reals.at("loss_scale");
  for (std::size_t i = 0; i < reals.size(); ++i) {
    EXPECT_EQ(std::bit_cast<std::uint64_t>(reals[i]),
              std::bit_cast<std::uint64_t>(state.values.reals.at("loss_scale")[i]));
  }
  EXPECT_EQ(checkpoint.state().blobs, state.blobs);
  EXPECT_EQ(checkpoint.state().tensors, state.tensors);
  EXPECT_EQ(checkpoint.state().buffers, state.buffers);
  EXPECT_EQ(checkpoint.updates_for(state, 0), 12);
}

TEST(Layouts, AnotherModelIsRefusedByItsFirstParameter) {
  SystemCalls& calls = SystemCalls::native();
  const ScratchFolder scratch;
  const StoredState state = describe(odd_model(), {2, 1});
  Memory memory(state);
  memory.fill();
  DirectoryWriter directory(calls, scratch.path(), {});
  const Checkpoint checkpoint = Checkpoint::open(calls, save(calls, directory, state, memory));
  StoredState other = state;
  other.tensors[0].shape = {29, 37};
  try {
    checkpoint.require_same_tensors(other);
    FAIL();
  } catch (const FormatError& error) {
    const std::string line = error.what();
    EXPECT_NE(line.find("\"first/matrix\""), std::string::npos) << line;
    EXPECT_NE(line.find("expected shape (29, 37), found (37, 29)"), std::string::npos) << line;
  }
}

TEST(Layouts, ThousandsOfTensors) {
  Model model;
  for (int u = 0; u < 20; ++u) {
    const UnitId unit = model.unit("layer" + std::to_string(u));
    for (int i = 0; i < 150; ++i) {
      model.parameter(unit, "w" + std::to_string(i), {(u * 150 + i) * 7 % 101, 3});
    }
  }
  SystemCalls& calls = SystemCalls::native();
  const ScratchFolder scratch;
  const StoredState state = describe(model, {4, 4});
  Memory memory(state);
  memory.fill();
  DirectoryWriter directory(calls, scratch.path(), {});
  const Checkpoint checkpoint = Checkpoint::open(calls, save(calls, directory, state, memory));
  const StoredState wanted = describe(model, {3, 3, false, 90});
  checkpoint.require_same_tensors(wanted);
  Memory expected(wanted);
  expected.fill();
  Memory loaded(wanted);
  for (int tau = 0; tau < 3; ++tau) checkpoint.read(wanted, loaded.parts<std::byte>(tau, 0, 1));
  EXPECT_TRUE(loaded == expected);
}

TEST(Layouts, WritersAreSpreadOverTheReplicas) {
  for (int replicas = 1; replicas <= 17; ++replicas) {
    for (int parts = 1; parts <= replicas; ++parts) {
      std::vector<int> of;
      for (int r = 0; r < replicas; ++r) {
        if (const auto part = part_of_replica(r, replicas, parts)) of.push_back(*part);
      }
      ASSERT_EQ(std::ssize(of), parts);
      for (int k = 0; k < parts; ++k) ASSERT_EQ(of[static_cast<std::size_t>(k)], k);
    }
  }
}

}  // namespace
}  // namespace mics::checkpoint::test
