// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/stored_state.hpp>
#include <mics/h5/file_builder.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace mics::checkpoint::detail {

/// Part `part` of shard `shard`, one file.
struct PieceId {
  int shard = 0;
  int part = 0;
  friend bool operator==(const PieceId&, const PieceId&) = default;
};

/// A piece's place in lists of all pieces, and back: shard-major.
[[nodiscard]] constexpr int piece_index(PieceId id, int parts) {
  return id.shard * parts + id.part;
}
[[nodiscard]] constexpr PieceId piece_id(int index, int parts) {
  return {index / parts, index % parts};
}

/// The scalars of a buffer that a piece holds: units of 256 scalars of the shard, divided evenly.
/// Where R slices are R parts, a part is a slice.
[[nodiscard]] layout::Interval part_of_shard(const StoredState& state, int buffer, PieceId id,
                                             int parts);

/// Scalars of one buffer's array that lie end to end in a dataset.
struct Run {
  int buffer = -1;
  int array = -1;
  layout::Interval range;   ///< scalars of the buffer
  std::int64_t offset = 0;  ///< in the dataset, in scalars
};

/// One dataset of a piece: all parts of arrays of one name, dtype and kind, in the order of
/// buffers.
struct PieceDataset {
  std::string array;
  DType dtype = DType::fp32;
  bool complex = false;
  std::vector<Run> runs;
  std::int64_t scalars = 0;

  [[nodiscard]] std::string path() const;  ///< `/exp_avg/fp32`, `/exp_avg/complex_fp32`
  [[nodiscard]] std::int64_t bytes() const { return scalars * bytes_of(dtype); }
};

/// What a piece holds, a function of the state and the number of parts alone: the same for writers
/// and readers. Datasets without elements are left out.
[[nodiscard]] std::vector<PieceDataset> piece_contents(const StoredState& state, PieceId id,
                                                       int parts);

/// Where things are in a piece's file.
struct Piece {
  std::string file;
  std::int64_t bytes = 0;
  std::vector<std::int64_t> offsets;  ///< of the elements of each dataset, in the file
  friend bool operator==(const Piece&, const Piece&) = default;
};

/// `s0001_r03-<first 8 digits of the save's id>.h5`
[[nodiscard]] std::string piece_name(PieceId id, std::string_view save_id);

/// Lays out a piece's file. Needs an h5::Session.
[[nodiscard]] h5::Skeleton make_skeleton(const StoredState& state,
                                         const std::vector<PieceDataset>& contents, PieceId id,
                                         int parts, std::string_view save_id, Piece& piece);

/// A part of a tensor within a run.
struct TensorPart {
  int segment = -1;        ///< index in the buffer's segments
  layout::Interval range;  ///< scalars of the buffer
};

/// The parts of tensors that lie in `range` of a buffer, ascending.
[[nodiscard]] std::vector<TensorPart> tensor_parts(const StoredBuffer& buffer,
                                                   const layout::Interval& range);

}  // namespace mics::checkpoint::detail
