// SPDX-License-Identifier: Apache-2.0
// mics_checkpoint_sample DIRECTORY WORLD SHARD [ROWS [STEP]]: saves the odd model in that layout,
// with a matrix of ROWS x 1000 if that is not 0, as that step or 12, and puts the bits of every
// tensor of every array beside it: sample.txt has a line for each, sample.bin the bits.
#include "stored_model.hpp"
#include <mics/base/error.hpp>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>

namespace {

using namespace mics;
using namespace mics::checkpoint;
using namespace mics::checkpoint::test;

void write(const std::filesystem::path& path, int world, int shard, int rows, int step) {
  Model model = odd_model();
  if (rows > 0) model.parameter(model.unit("large"), "large/matrix", {rows, 1000});
  StoredState state = describe(model, {world, shard});
  if (step > 0) state.step = step;
  Memory memory(state);
  memory.fill();
  DirectoryWriter directory(SystemCalls::native(), path, {});
  save(SystemCalls::native(), directory, state, memory);

  const std::vector<std::string> paths = checkpoint::detail::tensor_paths(state.tensors);
  std::ofstream lines(path / "sample.txt");
  std::ofstream bits(path / "sample.bin", std::ios::binary);
  std::size_t next = 0;
  std::int64_t offset = 0;
  for (const StoredBuffer& buffer : state.buffers) {
    for (const StoredArray& array : buffer.arrays) {
      const std::vector<std::byte>& bytes = memory.arrays()[next++];
      for (const StoredSegment& segment : buffer.segments) {
        const StoredTensor& tensor = state.tensor(segment.tensor);
        const bool weights = array.name == master_weights || array.name == frozen_weights;
        const std::int64_t width = bytes_of(array.dtype);
        lines << (weights ? "/model" : "/optimizer/" + array.name)
              << paths[static_cast<std::size_t>(segment.tensor)] << ' ' << name(array.dtype) << ' '
              << (tensor.complex ? "complex" : "real") << ' '
              << (tensor.layout == MemoryLayout::left ? "left" : "right") << ' ' << offset << ' '
              << segment.range.length * width;
        for (const std::int64_t extent : tensor.shape) lines << ' ' << extent;
        lines << '\n';
        bits.write(reinterpret_cast<const char*>(bytes.data()) + segment.range.offset * width,
                   segment.range.length * width);
        offset += segment.range.length * width;
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4 || argc > 6) {
    std::fprintf(stderr, "usage: mics_checkpoint_sample DIRECTORY WORLD SHARD [ROWS [STEP]]\n");
    return 2;
  }
  try {
    write(argv[1], std::atoi(argv[2]), std::atoi(argv[3]), argc > 4 ? std::atoi(argv[4]) : 0,
          argc > 5 ? std::atoi(argv[5]) : 0);
  } catch (const Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
