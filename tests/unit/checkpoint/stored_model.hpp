// SPDX-License-Identifier: Apache-2.0
// A model of odd shapes in every layout, written and read by one process that plays all ranks.
#pragma once

#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/writer.hpp>
#include <mics/state/flat_model.hpp>

#include <gtest/gtest.h>
#include <unistd.h>

#include <bit>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace mics::checkpoint::test {

/// A folder that goes with the object.
class ScratchFolder {
 public:
  ScratchFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "mics-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no scratch folder");
    path_ = pattern;
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;
  ~ScratchFolder() {
    std::error_code error;
    std::filesystem::remove_all(path_, error);
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

/// A matrix that shards cut through, vectors, a scalar, nothing, complex and column-major
/// parameters, frozen ones, all four dtypes, a name with slashes that is another's folder.
inline Model odd_model() {
  Model model;
  const UnitId first = model.unit("first");
  model.parameter(first, "matrix", {37, 29});
  model.parameter(first, "bias", {29}, {.dtype = DType::bf16});
  model.parameter(first, "nothing", {3, 0, 2});
  model.parameter(first, "scalar", {});
  const UnitId second = model.unit("second");
  model.parameter(second, "real", {11, 5, 7}, {.layout = MemoryLayout::left});
  model.parameter(second, "spectrum", {9, 13}, {.complex = true});
  model.parameter(second, "between", {65});
  model.parameter(second, "columns", {6, 5}, {.complex = true, .layout = MemoryLayout::left});
  model.parameter(second, "wide", {4, 8}, {.dtype = DType::fp64, .complex = true});
  const UnitId frozen = model.unit("frozen");
  model.parameter(frozen, "table", {17, 31}, {.dtype = DType::fp16, .trainable = false});
  model.parameter(frozen, "table/inner", {2000}, {.dtype = DType::bf16, .trainable = false});
  model.parameter(frozen, "trained", {1, 1, 300, 1}, {.dtype = DType::fp64});
  return model;
}

/// How a model is laid out.
struct Placement {
  int world = 1;
  int shard = 1;
  bool over_world = false;       ///< optimizer state in slices over the replicas
  std::int64_t persistence = 0;  ///< parameters up to this size lie in persistent buffers
  DType dtype = DType::fp32;     ///< of parameters that name none
  [[nodiscard]] int replicas() const { return world / shard; }
};

inline StoredState describe(const Model& model, const Placement& placement) {
  const int slices = placement.over_world ? placement.replicas() : 1;
  const state::FlatModel flat(model, placement.dtype, placement.shard, slices,
                              {.threshold = placement.persistence});
  StoredState state = describe_state(
      model, flat, {placement.world, placement.shard, slices, placement.world},
      [&](int b) -> std::vector<StoredArray> {
        const state::FlatBuffer& buffer = flat.buffer(b);
        if (!buffer.trainable) return {{std::string(frozen_weights), buffer.dtype}};
        const DType master = buffer.dtype == DType::fp64 ? DType::fp64 : DType::fp32;
        return {{std::string(master_weights), master}, {"exp_avg", master}, {"exp_avg_sq", master}};
      });
  for (StoredBuffer& buffer : state.buffers) buffer.updates = 12;
  state.step = 12;
  state.values.integers["calls"] = 13;
  state.values.reals["loss_scale"] = {65536.0, -0.0, std::numeric_limits<double>::quiet_NaN()};
  state.values.texts["compute_dtype"] = std::string(name(placement.dtype));
  state.values.texts["configuration"] = "{\"train_batch_size\": 8}\n";
  state.blobs["position"] = {std::byte{1}, std::byte{0}, std::byte{255}};
  state.blobs["empty"] = {};
  return state;
}

/// Scalar `index` (in the order of memory) of a tensor in an array; kinds are told apart by name.
inline double value_of(const std::string& tensor, const std::string& array, std::int64_t index) {
  const bool weights = array == master_weights || array == frozen_weights;
  std::uint64_t seed = weights ? 17 : 0;
  for (const char c : weights ? tensor : tensor + '/' + array) {
    seed = seed * 131 + static_cast<unsigned char>(c);
  }
  // Small multiples of 2^-3: exact in every dtype.
  return static_cast<double>(
             static_cast<int>((seed + 37U * static_cast<std::uint64_t>(index)) % 255U) - 127) /
         8;
}

/// All arrays of all buffers, whole.
class Memory {
 public:
  explicit Memory(const StoredState& state) : state_(&state) {
    for (const StoredBuffer& buffer : state.buffers) {
      for (const StoredArray& array : buffer.arrays) {
        arrays_.emplace_back(static_cast<std::size_t>(buffer.count * bytes_of(array.dtype)),
                             std::byte{0xab});
      }
    }
  }

  /// Values by value_of(); gaps are zero.
  void fill() {
    each([&](int, int, const StoredBuffer& buffer, const StoredArray& array,
             std::vector<std::byte>& bytes) {
      std::fill(bytes.begin(), bytes.end(), std::byte{0});
      for (const StoredSegment& segment : buffer.segments) {
        const std::string& tensor = state_->tensor(segment.tensor).name;
        visit(array.dtype, [&](auto tag) {
          using T = typename decltype(tag)::type;
          for (std::int64_t i = 0; i < segment.range.length; ++i) {
            const T value(value_of(tensor, array.name, i));
            std::memcpy(
                bytes.data() + (segment.range.offset + i) * static_cast<std::int64_t>(sizeof(T)),
                &value, sizeof(T));
          }
        });
      }
    });
  }

  /// The parts that rank (tau, replica) holds.
  template <class Byte>
  std::vector<ArrayPart<Byte>> parts(int tau, int replica, int slices) {
    std::vector<ArrayPart<Byte>> result;
    each([&](int b, int a, const StoredBuffer& buffer, const StoredArray& array,
             std::vector<std::byte>& bytes) {
      layout::Interval range = state_->shard(b, tau);
      if (slices > 1 && array.name != frozen_weights) {
        range.length /= slices;
        range.offset += replica * range.length;
      }
      static_cast<void>(buffer);
      result.push_back({b, a, range, bytes.data() + range.offset * bytes_of(array.dtype)});
    });
    return result;
  }

  std::vector<std::vector<std::byte>>& arrays() { return arrays_; }
  friend bool operator==(const Memory& a, const Memory& b) { return a.arrays_ == b.arrays_; }

 private:
  template <class F>
  void each(F&& f) {
    std::size_t next = 0;
    for (std::size_t b = 0; b < state_->buffers.size(); ++b) {
      const StoredBuffer& buffer = state_->buffers[b];
      for (std::size_t a = 0; a < buffer.arrays.size(); ++a) {
        f(static_cast<int>(b), static_cast<int>(a), buffer, buffer.arrays[a], arrays_[next++]);
      }
    }
  }
  const StoredState* state_;
  std::vector<std::vector<std::byte>> arrays_;
};

/// Writes and commits a step as all its ranks would.
inline std::filesystem::path save(SystemCalls& calls, DirectoryWriter& directory,
                                  const StoredState& state, Memory& memory,
                                  const PieceSize& size = {.min_bytes = 0}) {
  const int parts = parts_of_shard(state, size);
  const std::string id = make_save_id();
  std::vector<PieceWriter> writers;
  std::vector<detail::Piece> pieces;
  std::vector<PieceSums> sums;
  for (int tau = 0; tau < state.grid.shard_size; ++tau) {
    for (int replica = 0; replica < state.grid.replicas(); ++replica) {
      const auto part = part_of_replica(replica, state.grid.replicas(), parts);
      if (!part) continue;
      writers.emplace_back(state, detail::PieceId{tau, *part}, parts, id);
      const auto sources = memory.parts<const std::byte>(tau, replica, state.grid.slices);
      writers.back().attach(sources);
      pieces.push_back(writers.back().piece());
    }
  }
  StepWriter step(state, parts, id, pieces);
  const std::filesystem::path folder = directory.begin(state.step, id);
  for (const PieceWriter& writer : writers) sums.push_back(writer.write(calls, folder));
  const Commit commit = step.complete(sums);
  return directory.commit(folder, commit, step.manifest());
}

}  // namespace mics::checkpoint::test
