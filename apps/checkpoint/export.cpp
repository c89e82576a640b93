// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/state/model.hpp>

#include <checkpoint/export.hpp>
#include <nlohmann/json.hpp>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

namespace mics::apps {
namespace {

using namespace mics::checkpoint;

constexpr std::int64_t batch_bytes = std::int64_t{256} << 20;

const char* safetensors_name(DType dtype) {
  switch (dtype) {
    case DType::fp64:
      return "F64";
    case DType::bf16:
      return "BF16";
    case DType::fp16:
      return "F16";
    case DType::fp32:
      break;
  }
  return "F32";
}

struct Entry {
  int tensor = -1;
  StoredArray array;
  std::int64_t bytes = 0;
};

// Tensors of one dtype end to end, as the one buffer of a model of their own.
std::vector<std::byte> read_batch(const Checkpoint& checkpoint, std::span<const Entry> entries) {
  StoredState wanted;
  StoredBuffer& buffer = wanted.buffers.emplace_back();
  buffer.name = "batch";
  buffer.arrays = {entries.front().array};
  for (const Entry& entry : entries) {
    wanted.tensors.push_back(checkpoint.state().tensor(entry.tensor));
    const std::int64_t scalars = wanted.tensors.back().scalars();
    buffer.segments.push_back(
        {static_cast<int>(wanted.tensors.size()) - 1, {buffer.count, scalars}});
    buffer.count += scalars;
  }
  std::vector<std::byte> data(
      static_cast<std::size_t>(buffer.count * bytes_of(entries.front().array.dtype)));
  const Target target{0, 0, {0, buffer.count}, data.data()};
  checkpoint.read(wanted, std::span(&target, 1));
  // Blocks that verify need not lie where the manifest has them: another program's may not.
  std::vector<std::uint32_t> digests;
  std::span<const std::byte> rest = data;
  for (const Entry& entry : entries) {
    digests.push_back(crc32c(rest.first(static_cast<std::size_t>(entry.bytes))));
    rest = rest.subspan(static_cast<std::size_t>(entry.bytes));
  }
  checkpoint.require_same_digests(wanted, digests, [](int, int) { return true; });
  return data;
}

// The name that a file has until it is whole. What is under it in the end is removed.
class Partial {
 public:
  explicit Partial(std::filesystem::path file) : path_(std::move(file)) {
    path_ += ".partial";
    remove();
  }
  Partial(const Partial&) = delete;
  Partial& operator=(const Partial&) = delete;
  ~Partial() { remove(); }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  void remove() noexcept {
    std::error_code ignored;
    std::filesystem::remove(path_, ignored);
  }

  std::filesystem::path path_;
};

// A column-major tensor in row-major order.
void make_row_major(const StoredTensor& tensor, std::int64_t element_bytes,
                    std::span<std::byte> data) {
  const std::vector<std::byte> from(data.begin(), data.end());
  for (std::int64_t position = 0; position < tensor.count(); ++position) {
    const std::int64_t index = element_index(tensor.shape, tensor.layout, position);
    std::memcpy(data.data() + index * element_bytes, from.data() + position * element_bytes,
                static_cast<std::size_t>(element_bytes));
  }
}

}  // namespace

int export_safetensors(const Checkpoint& checkpoint, const std::string& array,
                       const std::filesystem::path& file) {
  std::vector<Entry> entries;
  for (const StoredBuffer& buffer : checkpoint.state().buffers) {
    for (const StoredArray& stored : buffer.arrays) {
      const bool weights = stored.name == master_weights || stored.name == frozen_weights;
      if (stored.name != array && !(weights && array == "weights")) continue;
      for (const StoredSegment& segment : buffer.segments) {
        entries.push_back({segment.tensor, stored, segment.range.length * bytes_of(stored.dtype)});
      }
    }
  }
  if (entries.empty()) {
    raise<FormatError>({.object = in_quotes(checkpoint.folder().string()),
                        .expected = "an array " + in_quotes(array),
                        .found = "none",
                        .remedy = "mics checkpoint inspect lists them"});
  }

  nlohmann::ordered_json header;
  header["__metadata__"] = {
      {"format", "mics"}, {"array", array}, {"step", std::to_string(checkpoint.state().step)}};
  std::int64_t offset = 0;
  for (const Entry& entry : entries) {
    const StoredTensor& tensor = checkpoint.state().tensor(entry.tensor);
    std::vector<std::int64_t> shape = tensor.shape;
    if (tensor.complex) shape.push_back(2);
    header[tensor.name] = {{"dtype", safetensors_name(entry.array.dtype)},
                           {"shape", shape},
                           {"data_offsets", {offset, offset + entry.bytes}}};
    offset += entry.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // elements begin at a multiple of 8

  std::error_code ignored;
  const auto status = std::filesystem::status(file, ignored);
  if (file.filename().empty() ||
      (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status))) {
    // What is written takes the place of what is there: a device would be gone.
    raise<ArgumentError>({.object = in_quotes(file.string()),
                          .expected = "the name of a file",
                          .found = std::filesystem::is_directory(status) ? "a folder"
                                   : file.filename().empty()             ? "none"
                                                                         : "a pipe or a device"});
  }

  SystemCalls& calls = SystemCalls::native();
  const Partial partial(file);
  File out(calls, partial.path(), Access::write);
  const auto length = static_cast<std::uint64_t>(text.size());
  out.write(std::as_bytes(std::span(&length, 1)), 0);
  out.write(std::as_bytes(std::span(text.data(), text.size())), sizeof(length));
  std::int64_t at = static_cast<std::int64_t>(sizeof(length) + text.size());
  for (std::size_t first = 0; first < entries.size();) {
    std::size_t last = first;
    std::int64_t bytes = 0;
    while (last < entries.size() && entries[last].array == entries[first].array &&
           (last == first || bytes + entries[last].bytes <= batch_bytes)) {
      bytes += entries[last++].bytes;
    }
    const std::span<const Entry> batch(entries.data() + first, last - first);
    std::vector<std::byte> data = read_batch(checkpoint, batch);
    std::span<std::byte> rest = data;
    for (const Entry& entry : batch) {
      const StoredTensor& tensor = checkpoint.state().tensor(entry.tensor);
      const auto part = rest.first(static_cast<std::size_t>(entry.bytes));
      const std::int64_t width = bytes_of(entry.array.dtype) * (tensor.complex ? 2 : 1);
      if (tensor.layout == MemoryLayout::left) make_row_major(tensor, width, part);
      rest = rest.subspan(part.size());
    }
    out.write(data, at);
    at += bytes;
    first = last;
  }
  out.sync();
  out.close();
  if (calls.rename(partial.path().c_str(), file.c_str()) != 0) raise_io("write it", file, errno);
  return static_cast<int>(entries.size());
}

}  // namespace mics::apps
