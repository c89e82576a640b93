// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/detail/piece.hpp>
#include <mics/h5/datatype.hpp>

#include <algorithm>
#include <array>
#include <cstdio>

namespace mics::checkpoint::detail {
namespace {

// Stretches of a buffer's interval that hold complex tensors, or none. The gap after a tensor goes
// with it: tensors begin at even scalars, so that no complex element is cut.
std::vector<std::pair<layout::Interval, bool>> stretches(const StoredState& state,
                                                         const StoredBuffer& buffer,
                                                         const layout::Interval& range) {
  std::vector<std::pair<layout::Interval, bool>> result;
  std::int64_t begin = 0;
  bool complex = false;
  const auto add = [&](std::int64_t end) {
    const layout::Interval part = intersection({begin, end - begin}, range);
    if (!part.empty()) result.emplace_back(part, complex);
  };
  bool first = true;
  for (const StoredSegment& segment : buffer.segments) {
    if (segment.range.empty()) continue;
    const bool its_kind = state.tensor(segment.tensor).complex;
    if (!first && its_kind != complex) {
      add(segment.range.offset);
      begin = segment.range.offset;
    }
    complex = its_kind;
    first = false;
  }
  add(buffer.count);
  return result;
}

}  // namespace

layout::Interval part_of_shard(const StoredState& state, int buffer, PieceId id, int parts) {
  constexpr std::int64_t unit = 256;
  const layout::Interval shard = state.shard(buffer, id.shard);
  const std::int64_t units = shard.length / unit;
  // units * parts would overflow beyond 2^63 / 256 scalars only.
  const auto cut = [&](std::int64_t part) { return unit * (units * part / parts); };
  return {shard.offset + cut(id.part), cut(id.part + 1) - cut(id.part)};
}

std::string PieceDataset::path() const {
  return '/' + array + (complex ? "/complex_" : "/") + std::string(name(dtype));
}

std::vector<PieceDataset> piece_contents(const StoredState& state, PieceId id, int parts) {
  std::vector<PieceDataset> datasets;
  const auto dataset = [&](const StoredArray& array, bool complex) -> PieceDataset& {
    for (PieceDataset& known : datasets) {
      if (known.array == array.name && known.dtype == array.dtype && known.complex == complex) {
        return known;
      }
    }
    return datasets.emplace_back(PieceDataset{array.name, array.dtype, complex, {}, 0});
  };
  for (int b = 0; b < static_cast<int>(state.buffers.size()); ++b) {
    const StoredBuffer& buffer = state.buffer(b);
    const layout::Interval part = part_of_shard(state, b, id, parts);
    if (part.empty()) continue;
    for (const auto& [range, complex] : stretches(state, buffer, part)) {
      for (std::size_t a = 0; a < buffer.arrays.size(); ++a) {
        PieceDataset& to = dataset(buffer.arrays[a], complex);
        to.runs.push_back({b, static_cast<int>(a), range, to.scalars});
        to.scalars += range.length;
      }
    }
  }
  return datasets;
}

std::string piece_name(PieceId id, std::string_view save_id) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "s%04d_r%02d-%.8s.h5", id.shard, id.part,
                std::string(save_id).c_str());
  return text.data();
}

h5::Skeleton make_skeleton(const StoredState& state, const std::vector<PieceDataset>& contents,
                           PieceId id, int parts, std::string_view save_id, Piece& piece) {
  piece = {piece_name(id, save_id), 0, {}};
  // The root with its attributes, then for each dataset its header, a group's and two links: about
  // 600 and 420 bytes, and the names.
  std::int64_t metadata = 1024;
  for (const PieceDataset& dataset : contents) metadata += 640 + 2 * std::ssize(dataset.path());
  h5::FileBuilder builder(piece.file, metadata);
  builder.attribute("/", "mics_checkpoint_piece", std::int64_t{1});
  builder.attribute("/", "save", std::string(save_id));
  builder.attribute("/", "step", state.step);
  builder.attribute("/", "shard", std::int64_t{id.shard});
  builder.attribute("/", "shards", std::int64_t{state.grid.shard_size});
  builder.attribute("/", "part", std::int64_t{id.part});
  builder.attribute("/", "parts", std::int64_t{parts});
  for (const PieceDataset& dataset : contents) {
    const std::int64_t extent = dataset.complex ? dataset.scalars / 2 : dataset.scalars;
    piece.offsets.push_back(builder.create_dataset(
        dataset.path(), h5::file_type(dataset.dtype, dataset.complex), std::span(&extent, 1)));
  }
  h5::Skeleton skeleton = builder.finish();
  piece.bytes = skeleton.bytes;
  return skeleton;
}

std::vector<TensorPart> tensor_parts(const StoredBuffer& buffer, const layout::Interval& range) {
  std::vector<TensorPart> parts;
  auto segment =
      std::partition_point(buffer.segments.begin(), buffer.segments.end(),
                           [&](const StoredSegment& s) { return s.range.end() <= range.offset; });
  for (; segment != buffer.segments.end() && segment->range.offset < range.end(); ++segment) {
    const layout::Interval part = intersection(segment->range, range);
    if (part.empty()) continue;
    parts.push_back({static_cast<int>(segment - buffer.segments.begin()), part});
  }
  return parts;
}

}  // namespace mics::checkpoint::detail
