// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/detail/manifest.hpp>
#include <mics/h5/datatype.hpp>
#include <mics/h5/image_reader.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <map>
#include <set>
#include <utility>

namespace mics::checkpoint::detail {
namespace {

std::string escaped(std::string_view part) {
  const auto code = [](char c) {
    std::array<char, 4> text{};
    std::snprintf(text.data(), text.size(), "%%%02X",
                  static_cast<unsigned>(static_cast<unsigned char>(c)));
    return std::string(text.data());
  };
  if (part.empty()) return "%";
  std::string result;
  const bool dots = part == "." || part == "..";
  for (const char c : part) {
    const bool plain = static_cast<unsigned char>(c) >= ' ' && c != '%' && c != 0x7f && !dots;
    result += plain ? std::string(1, c) : code(c);
  }
  return result;
}

std::string escaped_path(std::string_view name) {
  std::string path;
  while (true) {
    const auto slash = name.find('/');
    path += '/' + escaped(name.substr(0, slash));
    if (slash == std::string_view::npos) return path;
    name.remove_prefix(slash + 1);
  }
}

std::string group_of(const StoredArray& array) {
  if (array.name == master_weights || array.name == frozen_weights) return "/model";
  return "/optimizer/" + escaped(array.name);
}

// The groups of the views. Ascending paths: parents come first.
void create_groups(const StoredState& state, const std::vector<std::string>& paths,
                   h5::FileBuilder& builder) {
  std::set<std::string> links;
  std::map<std::string, std::pair<std::int64_t, std::int64_t>> groups;  // links, bytes of names
  for (const StoredBuffer& buffer : state.buffers) {
    for (const StoredArray& array : buffer.arrays) {
      for (const StoredSegment& segment : buffer.segments) {
        std::string path = group_of(array) + paths[static_cast<std::size_t>(segment.tensor)];
        while (!path.empty() && links.insert(path).second) {
          const auto slash = path.rfind('/');
          const std::int64_t bytes = std::ssize(path) - static_cast<std::int64_t>(slash) - 1;
          path.resize(slash);
          auto& [count, name_bytes] = groups[path];
          ++count;
          name_bytes += bytes;
        }
      }
    }
  }
  groups.erase("");
  for (const auto& [path, of] : groups) builder.create_group(path, of.first, of.second);
}

// Where a tensor's part lies.
struct Found {
  layout::Interval range;  // elements of the tensor
  const Piece* piece = nullptr;
  const PieceDataset* dataset = nullptr;
  std::int64_t start = 0;  // element of the dataset
};

}  // namespace

std::vector<Box> boxes_of(std::span<const std::int64_t> shape, std::int64_t begin,
                          std::int64_t end) {
  const std::size_t rank = shape.size();
  std::vector<std::int64_t> stride(rank, 1);
  for (std::size_t d = rank; d-- > 1;) stride[d - 1] = stride[d] * shape[d];
  std::vector<Box> boxes;
  while (begin < end) {
    Box box;
    std::int64_t rest = begin;
    for (std::size_t d = 0; d < rank; ++d) {
      box.start.push_back(rest / stride[d]);
      rest %= stride[d];
    }
    // The outermost dimension along which whole slabs begin here and fit.
    std::size_t d = 0;
    while (begin % stride[d] != 0 || end - begin < stride[d]) ++d;
    const std::int64_t slabs = std::min((end - begin) / stride[d], shape[d] - box.start[d]);
    box.shape.assign(rank, 1);
    box.shape[d] = slabs;
    for (std::size_t inner = d + 1; inner < rank; ++inner) box.shape[inner] = shape[inner];
    begin += slabs * stride[d];
    boxes.push_back(std::move(box));
  }
  return boxes;
}

std::vector<std::string> tensor_paths(const std::vector<StoredTensor>& tensors) {
  std::vector<std::string> paths;
  std::set<std::string> groups;
  for (const StoredTensor& tensor : tensors) {
    paths.push_back(escaped_path(tensor.name));
    const std::string& path = paths.back();
    for (auto slash = path.find('/', 1); slash != std::string::npos;
         slash = path.find('/', slash + 1)) {
      groups.insert(path.substr(0, slash));
    }
  }
  for (std::string& path : paths) {
    if (groups.contains(path)) path += '%';
  }
  return paths;
}

Manifest make_manifest(const Description& description,
                       std::span<const std::vector<std::byte>* const> blobs) {
  const StoredState& state = description.state;
  h5::FileBuilder builder(std::string(manifest_name), std::int64_t{1} << 12);
  builder.attribute("/", "mics_checkpoint", std::int64_t{1});
  builder.attribute("/", "save", description.id);
  builder.attribute("/", "step", state.step);

  // The index first: it is what a load reads.
  const std::string json = to_json(description);
  const std::int64_t json_at = builder.create_bytes("/index/description", std::ssize(json));
  const h5::Datatype word(H5Tcopy(H5T_STD_U32LE), "copy", "a type");
  std::int64_t blocks = 0;
  for (const Piece& piece : description.pieces) blocks += crc_blocks(piece.bytes);
  Manifest manifest;
  manifest.block_crcs = builder.create_dataset("/index/block_crc32c", word, std::span(&blocks, 1));
  std::int64_t digests = 0;
  for (const StoredBuffer& buffer : state.buffers) {
    digests += std::ssize(buffer.arrays) * std::ssize(buffer.segments);
  }
  manifest.digests = builder.create_dataset("/index/digest_crc32c", word, std::span(&digests, 1));
  std::vector<std::int64_t> blobs_at;
  for (std::size_t i = 0; i < blobs.size(); ++i) {
    blobs_at.push_back(builder.create_bytes("/blobs/" + std::to_string(i), std::ssize(*blobs[i])));
    builder.attribute("/blobs/" + std::to_string(i), "name", description.blobs[i].first);
  }

  // Which pieces hold what of each (buffer, array, segment).
  std::vector<std::vector<PieceDataset>> contents;
  std::vector<std::vector<std::vector<Found>>> found(state.buffers.size());
  for (std::size_t b = 0; b < found.size(); ++b) {
    found[b].resize(state.buffers[b].arrays.size() * state.buffers[b].segments.size());
  }
  for (std::size_t i = 0; i < description.pieces.size(); ++i) {
    contents.push_back(
        piece_contents(state, piece_id(static_cast<int>(i), description.parts), description.parts));
  }
  for (std::size_t i = 0; i < description.pieces.size(); ++i) {
    for (const PieceDataset& dataset : contents[i]) {
      const std::int64_t scalars = dataset.complex ? 2 : 1;
      for (const Run& run : dataset.runs) {
        const StoredBuffer& buffer = state.buffer(run.buffer);
        for (const TensorPart& part : tensor_parts(buffer, run.range)) {
          const std::int64_t begin =
              buffer.segments[static_cast<std::size_t>(part.segment)].range.offset;
          found[static_cast<std::size_t>(run.buffer)]
               [static_cast<std::size_t>(run.array) * buffer.segments.size() +
                static_cast<std::size_t>(part.segment)]
                   .push_back({{(part.range.offset - begin) / scalars, part.range.length / scalars},
                               &description.pieces[i],
                               &dataset,
                               (run.offset + part.range.offset - run.range.offset) / scalars});
        }
      }
    }
  }

  const std::vector<std::string> paths = tensor_paths(state.tensors);
  create_groups(state, paths, builder);
  std::map<std::pair<DType, bool>, h5::Datatype> types;
  for (std::size_t b = 0; b < state.buffers.size(); ++b) {
    const StoredBuffer& buffer = state.buffers[b];
    for (std::size_t a = 0; a < buffer.arrays.size(); ++a) {
      const StoredArray& array = buffer.arrays[a];
      for (std::size_t s = 0; s < buffer.segments.size(); ++s) {
        const StoredTensor& tensor = state.tensor(buffer.segments[s].tensor);
        const std::string path =
            group_of(array) + paths[static_cast<std::size_t>(buffer.segments[s].tensor)];
        h5::Datatype& type = types[{array.dtype, tensor.complex}];
        if (type.id() < 0) type = builder.share(h5::file_type(array.dtype, tensor.complex));
        std::vector<std::int64_t> shape = tensor.shape;
        if (shape.empty()) shape = {1};
        if (tensor.layout == MemoryLayout::left) std::reverse(shape.begin(), shape.end());
        if (tensor.count() == 0) {
          builder.create_dataset(path, type, shape);
        } else {
          std::vector<h5::VirtualBlock> views;
          for (const Found& part : found[b][a * buffer.segments.size() + s]) {
            auto source = static_cast<hsize_t>(part.start);
            for (const Box& box : boxes_of(shape, part.range.offset, part.range.end())) {
              h5::VirtualBlock& view = views.emplace_back();
              view.start.assign(box.start.begin(), box.start.end());
              view.shape.assign(box.shape.begin(), box.shape.end());
              view.file = part.piece->file;
              view.dataset = part.dataset->path();
              view.source_start = source;
              view.source_count = static_cast<hsize_t>(
                  part.dataset->complex ? part.dataset->scalars / 2 : part.dataset->scalars);
              hsize_t product = 1;
              for (const hsize_t extent : view.shape) product *= extent;
              source += product;
            }
          }
          builder.create_virtual(path, type, shape, views,
                                 h5::nan_element(array.dtype, tensor.complex));
        }
        if (bytes_of(array.dtype) == 2) {
          builder.attribute(path, "dtype", array.dtype == DType::bf16 ? "bfloat16" : "float16");
        }
        if (tensor.layout == MemoryLayout::left) {
          builder.attribute(path, "layout", std::string("left"));
          if (!tensor.shape.empty()) builder.attribute(path, "shape", tensor.shape);
        }
        if (paths[static_cast<std::size_t>(buffer.segments[s].tensor)] != '/' + tensor.name) {
          builder.attribute(path, "name", tensor.name);
        }
      }
    }
  }

  types.clear();
  h5::Skeleton skeleton = builder.finish();
  manifest.bytes = std::move(skeleton.head);
  manifest.bytes.resize(static_cast<std::size_t>(skeleton.bytes));
  const auto place = [&](const void* data, std::size_t bytes, std::int64_t at) {
    if (bytes != 0) std::memcpy(manifest.bytes.data() + at, data, bytes);
  };
  place(json.data(), json.size(), json_at);
  for (std::size_t i = 0; i < blobs.size(); ++i) {
    place(blobs[i]->data(), blobs[i]->size(), blobs_at[i]);
  }
  return manifest;
}

ManifestContents read_manifest(std::span<const std::byte> bytes) {
  const h5::ImageReader reader(std::string(manifest_name), bytes);
  const std::vector<std::byte> json = reader.read_bytes("/index/description");
  ManifestContents contents;
  contents.description = from_json({reinterpret_cast<const char*>(json.data()), json.size()});
  const Description& description = contents.description;
  const std::vector<std::uint32_t> words = reader.read_words("/index/block_crc32c");
  std::size_t next = 0;
  for (const Piece& piece : description.pieces) {
    const auto count = static_cast<std::size_t>(crc_blocks(piece.bytes));
    if (count > words.size() - next) break;
    contents.block_crcs.emplace_back(words.begin() + static_cast<std::ptrdiff_t>(next),
                                     words.begin() + static_cast<std::ptrdiff_t>(next + count));
    next += count;
  }
  contents.digests = reader.read_words("/index/digest_crc32c");
  std::size_t digests = 0;
  for (const StoredBuffer& buffer : description.state.buffers) {
    digests += buffer.arrays.size() * buffer.segments.size();
  }
  if (contents.block_crcs.size() != description.pieces.size() || next != words.size() ||
      digests != contents.digests.size()) {
    raise<FormatError>({.object = "index of " + std::string(manifest_name),
                        .expected = "a CRC for every block and every tensor's array",
                        .found = std::to_string(words.size()) + " and " +
                                 std::to_string(contents.digests.size())});
  }
  for (std::size_t i = 0; i < description.blobs.size(); ++i) {
    contents.description.state.blobs[description.blobs[i].first] =
        reader.read_bytes("/blobs/" + std::to_string(i));
  }
  return contents;
}

}  // namespace mics::checkpoint::detail
