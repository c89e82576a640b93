// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/detail/piece.hpp>
#include <mics/checkpoint/reshard.hpp>
#include <mics/layout/flat_layout.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace mics::checkpoint {
namespace {

using layout::intersection;
using layout::Interval;

// The dtype of a gathered parameter.
DType compute_dtype_of(const StoredTensor& tensor, DType compute) {
  const bool widened = tensor.complex && bytes_of(compute) < 4;
  return tensor.dtype.value_or(widened ? DType::fp32 : compute);
}

// The dtypes of a buffer's arrays for one of its tensors.
std::vector<DType> dtypes_of(const StoredBuffer& buffer, const StoredTensor& tensor, DType before,
                             DType after) {
  const DType was = compute_dtype_of(tensor, before);
  const DType is = compute_dtype_of(tensor, after);
  std::vector<DType> dtypes;
  for (const StoredArray& array : buffer.arrays) {
    if (was == is) {
      dtypes.push_back(array.dtype);
    } else if (array.name == frozen_weights) {
      dtypes.push_back(is);
    } else if (is == DType::fp64 || was == DType::fp64) {
      dtypes.push_back(is == DType::fp64 ? DType::fp64 : DType::fp32);
    } else {
      dtypes.push_back(array.dtype);
    }
  }
  return dtypes;
}

DType compute_dtype_of(const StoredState& state) {
  const auto text = state.values.texts.find(std::string(compute_dtype_text));
  if (text == state.values.texts.end()) {
    raise<FormatError>({.object = "state of step " + std::to_string(state.step),
                        .expected = "a text " + in_quotes(compute_dtype_text),
                        .found = "none",
                        .remedy = "keep the dtypes: any engine converts them when it loads"});
  }
  return parse_dtype(text->second, std::string(compute_dtype_text));
}

// Gives the bytes of a piece's file out of a window of elements that are read when they are needed.
class PieceSource {
 public:
  PieceSource(const Checkpoint& from, const StoredState& state, const PieceWriter& writer,
              int parts, std::int64_t window_bytes)
      : from_(from), state_(state), window_bytes_(window_bytes) {
    const std::vector<detail::PieceDataset> contents =
        detail::piece_contents(state, writer.id(), parts);
    for (std::size_t d = 0; d < contents.size(); ++d) {
      const std::int64_t width = bytes_of(contents[d].dtype);
      for (const detail::Run& run : contents[d].runs) {
        stretches_.push_back(
            {{writer.piece().offsets[d] + run.offset * width, run.range.length * width},
             run.buffer,
             run.array,
             run.range.offset,
             width});
      }
    }
    std::sort(stretches_.begin(), stretches_.end(),
              [](const Stretch& a, const Stretch& b) { return a.bytes.offset < b.bytes.offset; });
  }

  const std::byte* bytes_at(const Interval& wanted) {
    if (wanted.offset < here_.offset || wanted.end() > here_.end()) read(wanted);
    return memory_.get() + slack + (wanted.offset - here_.offset);
  }

 private:
  struct Stretch {
    Interval bytes;  // of the file
    int buffer = -1;
    int array = -1;
    std::int64_t first = 0;  // scalar of the buffer
    std::int64_t width = 0;
  };

  // A window cuts through scalars: those at its ends are read whole.
  static constexpr std::int64_t slack = 8;

  void read(const Interval& wanted) {
    here_ = {wanted.offset, std::max(window_bytes_, wanted.length)};
    if (here_.length > capacity_) {
      capacity_ = here_.length;
      memory_ = std::make_unique_for_overwrite<std::byte[]>(
          static_cast<std::size_t>(capacity_ + 2 * slack));
    }
    std::vector<Target> targets;
    for (const Stretch& stretch : stretches_) {
      const Interval part = intersection(stretch.bytes, here_);
      if (part.empty()) continue;
      const std::int64_t begin = (part.offset - stretch.bytes.offset) / stretch.width;
      const std::int64_t end =
          (part.end() - stretch.bytes.offset + stretch.width - 1) / stretch.width;
      const std::int64_t at = stretch.bytes.offset + begin * stretch.width - here_.offset;
      targets.push_back({stretch.buffer,
                         stretch.array,
                         {stretch.first + begin, end - begin},
                         memory_.get() + slack + at});
    }
    from_.read(state_, targets);
  }

  const Checkpoint& from_;
  const StoredState& state_;
  std::int64_t window_bytes_;
  std::vector<Stretch> stretches_;  // ascending
  Interval here_;                   // bytes of the file in memory
  std::int64_t capacity_ = 0;
  std::unique_ptr<std::byte[]> memory_;
};

}  // namespace

StoredState reshaped(const StoredState& state, const StoredGrid& grid,
                     std::optional<DType> compute) {
  StoredState result = state;
  result.grid = grid;
  result.buffers.clear();
  const DType before = compute ? compute_dtype_of(state) : DType::fp32;
  for (const StoredBuffer& buffer : state.buffers) {
    // Tensors of a buffer by the dtypes of their arrays, in the order of their first ones.
    std::vector<std::pair<std::vector<DType>, std::vector<int>>> kinds;
    for (const StoredSegment& segment : buffer.segments) {
      const std::vector<DType> dtypes =
          dtypes_of(buffer, state.tensor(segment.tensor), before, compute.value_or(before));
      auto kind = std::find_if(kinds.begin(), kinds.end(),
                               [&](const auto& known) { return known.first == dtypes; });
      if (kind == kinds.end()) kind = kinds.insert(kinds.end(), {dtypes, {}});
      kind->second.push_back(segment.tensor);
    }
    for (const auto& [dtypes, tensors] : kinds) {
      StoredBuffer& to = result.buffers.emplace_back();
      to.name = buffer.name;
      if (kinds.size() > 1 && !dtypes.empty()) to.name += ':' + std::string(name(dtypes.front()));
      to.updates = buffer.updates;
      to.arrays = buffer.arrays;
      for (std::size_t a = 0; a < dtypes.size(); ++a) to.arrays[a].dtype = dtypes[a];
      std::vector<std::int64_t> counts;
      for (const int tensor : tensors) counts.push_back(state.tensor(tensor).scalars());
      const auto flat = layout::FlatLayout::make(counts, grid.shard_size, grid.slices);
      to.count = flat.count();
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        to.segments.push_back({tensors[i], flat.parameter(static_cast<std::int64_t>(i))});
      }
    }
  }
  if (compute) {
    result.values.texts[std::string(compute_dtype_text)] = std::string(name(*compute));
  }
  result.validate();
  return result;
}

Resharded reshard(SystemCalls& calls, const Checkpoint& from, DirectoryWriter& to,
                  const Reshaping& reshaping) {
  const StoredState state = reshaped(from.state(), reshaping.grid, reshaping.compute);
  const int parts = parts_of_shard(state, reshaping.size);
  const std::string id = make_save_id();
  std::vector<PieceWriter> writers;
  std::vector<detail::Piece> pieces;
  for (int i = 0; i < state.grid.shard_size * parts; ++i) {
    writers.emplace_back(state, detail::piece_id(i, parts), parts, id);
    pieces.push_back(writers.back().piece());
  }
  StepWriter step(state, parts, id, std::move(pieces));
  const std::filesystem::path folder = to.begin(state.step, id);
  try {
    std::vector<PieceSums> sums;
    for (PieceWriter& writer : writers) {
      PieceSource source(from, state, writer, parts, reshaping.window_bytes);
      writer.attach([&source](const Interval& bytes) { return source.bytes_at(bytes); });
      sums.push_back(writer.write(calls, folder));
    }
    const std::int64_t same = from.require_same_digests(state, combine_digests(state, parts, sums),
                                                        [](int, int) { return true; });
    Resharded result{.folder = {}, .commit = step.complete(sums), .converted = -same};
    for (const StoredBuffer& buffer : state.buffers) {
      result.converted += std::ssize(buffer.arrays) * std::ssize(buffer.segments);
    }
    result.folder = to.commit(folder, result.commit, step.manifest());
    return result;
  } catch (...) {
    to.abandon(folder);
    throw;
  }
}

}  // namespace mics::checkpoint
