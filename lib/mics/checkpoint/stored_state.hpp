// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/layout/interval.hpp>
#include <mics/state/flat_model.hpp>
#include <mics/state/model.hpp>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mics::checkpoint {

/// The weights that the optimizer works on: the array of every trainable buffer.
inline constexpr std::string_view master_weights = "master_weights";
/// The weights of frozen buffers, which have no other array: their compute shards.
inline constexpr std::string_view frozen_weights = "weights";

/// A parameter as it is stored.
struct StoredTensor {
  std::string name;
  std::vector<std::int64_t> shape;
  bool complex = false;  ///< an element is two scalars: real part, imaginary part
  MemoryLayout layout = MemoryLayout::right;
  bool trainable = true;
  std::optional<DType> dtype = {};  ///< declared for the gathered parameter; none: the engine's

  [[nodiscard]] std::int64_t count() const;  ///< elements
  [[nodiscard]] std::int64_t scalars() const { return complex ? 2 * count() : count(); }
  friend bool operator==(const StoredTensor&, const StoredTensor&) = default;
};

/// One array of a buffer: master_weights, frozen_weights or a name of the optimizer's.
struct StoredArray {
  std::string name;
  DType dtype = DType::fp32;
  friend bool operator==(const StoredArray&, const StoredArray&) = default;
};

/// Where a tensor lies in a buffer.
struct StoredSegment {
  int tensor = -1;
  layout::Interval range;  ///< scalars of the buffer
  friend bool operator==(const StoredSegment&, const StoredSegment&) = default;
};

/// A flat buffer: tensors end to end, ascending, with gaps of zeros; cut into p equal shards.
struct StoredBuffer {
  std::string name;
  std::int64_t count = 0;  ///< scalars, padded: a multiple of 256 p, and of 256 p q
  std::vector<StoredSegment> segments;
  std::vector<StoredArray> arrays;
  std::int64_t updates = 0;  ///< steps that changed it
  friend bool operator==(const StoredBuffer&, const StoredBuffer&) = default;
};

/// The ranks that hold the state.
struct StoredGrid {
  int world_size = 1;  ///< W
  int shard_size = 1;  ///< p
  int slices = 1;      ///< q: 1, or R where master weights and optimizer states are sharded over W
  int ranks_per_node = 1;
  [[nodiscard]] int replicas() const { return world_size / shard_size; }
  friend bool operator==(const StoredGrid&, const StoredGrid&) = default;
};

/// Named values of the engine's: step counts, loss scaler, schedule, seed, configuration.
struct StoredValues {
  std::map<std::string, std::int64_t> integers;
  std::map<std::string, std::vector<double>> reals;  ///< kept to the last bit
  std::map<std::string, std::string> texts;          ///< UTF-8
  friend bool operator==(const StoredValues&, const StoredValues&) = default;
};

/// Everything that a checkpoint holds, but the elements of its arrays. The same on every rank.
struct StoredState {
  std::int64_t step = 0;
  StoredGrid grid;
  std::vector<StoredTensor> tensors;
  std::vector<StoredBuffer> buffers;
  StoredValues values;
  std::map<std::string, std::vector<std::byte>> blobs;  ///< the application's own

  [[nodiscard]] const StoredBuffer& buffer(int index) const {
    return buffers[static_cast<std::size_t>(index)];
  }
  [[nodiscard]] const StoredTensor& tensor(int index) const {
    return tensors[static_cast<std::size_t>(index)];
  }
  [[nodiscard]] std::int64_t shard_count(int buffer_index) const {
    return buffer(buffer_index).count / grid.shard_size;
  }
  [[nodiscard]] layout::Interval shard(int buffer_index, int tau) const {
    return {tau * shard_count(buffer_index), shard_count(buffer_index)};
  }
  /// Bytes of all arrays, once, without padding.
  [[nodiscard]] std::int64_t logical_bytes() const;

  /// \throws FormatError naming the first thing that does not fit: overlapping or unknown segments,
  ///         sizes that the grid does not divide, names twice
  void validate() const;
  friend bool operator==(const StoredState&, const StoredState&) = default;
};

/// The tensors and buffers of a model; the caller fills in step, update counts, values and blobs.
/// \param arrays  of buffer i: beginning with master_weights, or frozen_weights alone
[[nodiscard]] StoredState describe_state(
    const Model& model, const state::FlatModel& flat, const StoredGrid& grid,
    const std::function<std::vector<StoredArray>(int buffer)>& arrays);

/// Memory that holds a part of one array, `range.length` scalars of the array's dtype or, for
/// loading, of `dtype`. Host memory.
template <class Byte>
struct ArrayPart {
  int buffer = -1;
  int array = -1;          ///< index in the buffer's arrays
  layout::Interval range;  ///< scalars of the buffer
  Byte* data = nullptr;
};
/// What a rank can write: at least its pieces' part of every array.
using Source = ArrayPart<const std::byte>;
/// What a rank wants to read.
using Target = ArrayPart<std::byte>;

}  // namespace mics::checkpoint
