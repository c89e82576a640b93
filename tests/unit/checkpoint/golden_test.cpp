// SPDX-License-Identifier: Apache-2.0
// Checkpoints that earlier releases wrote, kept in golden/version<n>. `kinds` holds a tensor of
// every kind, made by mics_checkpoint_sample, with the bits of every array beside it.
#include "stored_model.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/reshard.hpp>
#include <mics/checkpoint/verify.hpp>

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace mics::checkpoint::test {
namespace {

const std::filesystem::path golden = std::filesystem::path(MICS_GOLDEN) / "version1" / "kinds";

/// The bits of each array's tensor that was saved, by its path in the manifest.
std::map<std::string, std::string> expected_bits() {
  std::ifstream file(golden / "sample.bin", std::ios::binary);
  const std::string bits(std::istreambuf_iterator<char>(file), {});
  std::ifstream lines(golden / "sample.txt");
  std::map<std::string, std::string> result;
  for (std::string line; std::getline(lines, line);) {
    std::istringstream words(line);
    std::string path, dtype, kind, layout;
    std::size_t offset = 0;
    std::size_t length = 0;
    words >> path >> dtype >> kind >> layout >> offset >> length;
    result[path + ' ' + dtype + ' ' + kind + ' ' + layout] = bits.substr(offset, length);
  }
  return result;
}

/// The same as a reader of one rank finds it.
std::map<std::string, std::string> loaded_bits(const Checkpoint& checkpoint) {
  const StoredState wanted =
      reshaped(checkpoint.state(), {.world_size = 1, .shard_size = 1}, std::nullopt);
  Memory memory(wanted);
  checkpoint.read(wanted, memory.parts<std::byte>(0, 0, 1));
  const std::vector<std::string> paths = detail::tensor_paths(wanted.tensors);
  std::map<std::string, std::string> result;
  std::size_t next = 0;
  for (const StoredBuffer& buffer : wanted.buffers) {
    for (const StoredArray& array : buffer.arrays) {
      const std::vector<std::byte>& bytes = memory.arrays()[next++];
      for (const StoredSegment& segment : buffer.segments) {
        const StoredTensor& tensor = wanted.tensor(segment.tensor);
        const bool weights = array.name == master_weights || array.name == frozen_weights;
        const auto width = static_cast<std::size_t>(bytes_of(array.dtype));
        result[(weights ? "/model" : "/optimizer/" + array.name) +
               paths[static_cast<std::size_t>(segment.tensor)] + ' ' +
               std::string(name(array.dtype)) + (tensor.complex ? " complex" : " real") +
               (tensor.layout == MemoryLayout::left ? " left" : " right")] =
            std::string(reinterpret_cast<const char*>(bytes.data()) +
                            static_cast<std::size_t>(segment.range.offset) * width,
                        static_cast<std::size_t>(segment.range.length) * width);
      }
    }
  }
  return result;
}

// Fails if what version 1 means changes while its number stays.
TEST(Golden, EveryKindOfTensorOfVersion1IsReadToTheBit) {
  const std::filesystem::path folder = golden / "step-000000012";
  EXPECT_EQ(verify(SystemCalls::native(), folder), std::vector<std::string>());
  const Checkpoint checkpoint = Checkpoint::open(SystemCalls::native(), folder);
  EXPECT_EQ(checkpoint.commit().writer, "mics 0.1.0");
  EXPECT_EQ(checkpoint.commit().digest, 0x36a95949U);
  EXPECT_EQ(checkpoint.state().grid, (StoredGrid{4, 2, 1, 4}));
  EXPECT_EQ(checkpoint.state().values.integers.at("calls"), 13);
  EXPECT_EQ(checkpoint.state().blobs.at("position"),
            (std::vector<std::byte>{std::byte{1}, std::byte{0}, std::byte{255}}));
  for (const StoredBuffer& buffer : checkpoint.state().buffers) EXPECT_EQ(buffer.updates, 12);

  const auto expected = expected_bits();
  EXPECT_EQ(expected.size(), 32U) << "12 tensors, 10 of them with two states";
  EXPECT_TRUE(loaded_bits(checkpoint) == expected);
}

// Fails if a tensor is stored under another name, dtype or order than version 1 stores it.
TEST(Golden, TodaysWriterWritesTheSameTensors) {
  const Checkpoint old = Checkpoint::open(SystemCalls::native(), golden / "step-000000012");
  const ScratchFolder scratch;
  const StoredState state = describe(odd_model(), {4, 2});
  Memory memory(state);
  memory.fill();
  DirectoryWriter directory(SystemCalls::native(), scratch.path(), {});
  const Checkpoint now = Checkpoint::open(SystemCalls::native(),
                                          save(SystemCalls::native(), directory, state, memory));
  EXPECT_EQ(now.commit().digest, old.commit().digest);
  EXPECT_EQ(now.commit().files.size(), old.commit().files.size());
  EXPECT_TRUE(std::equal(now.digests().begin(), now.digests().end(), old.digests().begin(),
                         old.digests().end()));
}

}  // namespace
}  // namespace mics::checkpoint::test
