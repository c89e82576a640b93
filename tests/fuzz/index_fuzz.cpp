// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/description.hpp>
#include <mics/checkpoint/detail/manifest.hpp>
#include <mics/checkpoint/detail/piece.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/h5/file_builder.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using namespace mics::checkpoint;
using mics::fuzz::require;

// What a run of the fuzzer may take; the text itself is not limited.
constexpr std::int64_t most_scalars = 1 << 16;
constexpr std::int64_t most_file_bytes = 1 << 21;

// A folder whose files hold zeros.
class Zeros : public SystemCalls {
 public:
  explicit Zeros(const std::vector<CommittedFile>& files) {
    for (const CommittedFile& file : files) sizes_[file.name] = file.bytes;
  }
  int open(const char* path, int, mode_t) override {
    const std::string_view text(path);
    const auto found = sizes_.find(std::string(text.substr(text.rfind('/') + 1)));
    require(found != sizes_.end());  // nothing but what COMMIT names is opened
    open_.push_back(found->second);
    return static_cast<int>(open_.size()) - 1;
  }
  int close(int) override { return 0; }
  int fstat(int descriptor, struct ::stat* status) override {
    status->st_mode = S_IFREG;
    status->st_size = open_[static_cast<std::size_t>(descriptor)];
    return 0;
  }
  ssize_t pread(int descriptor, void* data, std::size_t bytes, off_t offset) override {
    const std::int64_t rest = open_[static_cast<std::size_t>(descriptor)] - offset;
    const auto done = static_cast<std::size_t>(
        std::clamp<std::int64_t>(rest, 0, static_cast<std::int64_t>(bytes)));
    std::memset(data, 0, done);
    return static_cast<ssize_t>(done);
  }

 private:
  std::map<std::string, std::int64_t> sizes_;
  std::vector<std::int64_t> open_;
};

std::int64_t scalars_of(const StoredState& state) {
  std::int64_t scalars = 0;
  for (const StoredBuffer& buffer : state.buffers) {
    if (buffer.count > most_scalars) return buffer.count;
    scalars += buffer.count * static_cast<std::int64_t>(buffer.arrays.size());
  }
  return scalars;
}

// Every scalar of every array lies in one place of one piece.
void check_pieces(const detail::Description& description) {
  const StoredState& state = description.state;
  std::map<std::pair<int, int>, std::vector<mics::layout::Interval>> stored;  // buffer, array
  for (std::size_t i = 0; i < description.pieces.size(); ++i) {
    const auto id = detail::piece_id(static_cast<int>(i), description.parts);
    for (const auto& dataset : detail::piece_contents(state, id, description.parts)) {
      std::int64_t scalars = 0;
      for (const detail::Run& run : dataset.runs) {
        require(run.offset == scalars && run.range.length > 0);
        stored[{run.buffer, run.array}].push_back(run.range);
        scalars += run.range.length;
      }
      require(scalars == dataset.scalars && (!dataset.complex || scalars % 2 == 0));
    }
  }
  for (int b = 0; b < static_cast<int>(state.buffers.size()); ++b) {
    for (int a = 0; a < static_cast<int>(state.buffer(b).arrays.size()); ++a) {
      auto& ranges = stored[{b, a}];
      std::sort(ranges.begin(), ranges.end(),
                [](const auto& one, const auto& other) { return one.offset < other.offset; });
      std::int64_t end = 0;
      for (const mics::layout::Interval& range : ranges) {
        require(range.offset == end);
        end = range.end();
      }
      require(end == state.buffer(b).count);
    }
  }
}

std::optional<detail::Description> describe(const std::string& json) {
  try {
    detail::Description description = detail::from_json(json);
    const std::string again = detail::to_json(description);
    require(detail::to_json(detail::from_json(again)) == again);
    return description;
  } catch (const mics::FormatError& error) {
    mics::fuzz::require_one_line(error.what());
  }
  return {};
}

// A manifest that has an index and no views.
std::vector<std::byte> manifest_of(const std::string& json, const detail::Description* description,
                                   std::span<const std::uint32_t> crcs,
                                   std::span<const std::uint32_t> digests) {
  const mics::h5::Session session;
  mics::h5::FileBuilder builder("fuzz.h5", 4096);
  const mics::h5::Datatype word(H5Tcopy(H5T_STD_U32LE), "copy", "a type");
  const std::int64_t json_at =
      builder.create_bytes("/index/description", static_cast<std::int64_t>(json.size()));
  const auto count = static_cast<std::int64_t>(crcs.size());
  const std::int64_t crcs_at =
      builder.create_dataset("/index/block_crc32c", word, std::span(&count, 1));
  const auto tensors = static_cast<std::int64_t>(digests.size());
  const std::int64_t digests_at =
      builder.create_dataset("/index/digest_crc32c", word, std::span(&tensors, 1));
  for (std::size_t i = 0; description != nullptr && i < description->blobs.size(); ++i) {
    builder.create_bytes("/blobs/" + std::to_string(i), 3);
  }
  mics::h5::Skeleton skeleton = builder.finish();
  std::vector<std::byte> bytes = std::move(skeleton.head);
  bytes.resize(static_cast<std::size_t>(skeleton.bytes));
  const auto place = [&](const void* data, std::size_t size, std::int64_t at) {
    if (size != 0) std::memcpy(bytes.data() + at, data, size);
  };
  place(json.data(), json.size(), json_at);
  place(crcs.data(), crcs.size_bytes(), crcs_at);
  place(digests.data(), digests.size_bytes(), digests_at);
  return bytes;
}

// Opens a checkpoint with that index and loads all of it.
void load(const detail::Description& description, std::span<const std::byte> manifest,
          std::uint32_t manifest_crc) {
  const StoredState& state = description.state;
  Commit commit{state.step, description.id, "now", "mics 0", state.grid, 0, {}};
  commit.files.push_back({std::string(detail::manifest_name),
                          static_cast<std::int64_t>(manifest.size()), manifest_crc});
  for (const detail::Piece& piece : description.pieces) {
    commit.files.push_back({piece.file, piece.bytes, 0});
  }
  const std::string text = to_text(commit);
  std::vector<std::byte> packed(sizeof(std::uint64_t));
  const auto length = static_cast<std::uint64_t>(text.size());
  std::memcpy(packed.data(), &length, sizeof(length));
  const auto words = std::as_bytes(std::span(text.data(), text.size()));
  packed.insert(packed.end(), words.begin(), words.end());
  packed.insert(packed.end(), manifest.begin(), manifest.end());

  Zeros zeros(commit.files);
  try {
    const Checkpoint checkpoint = Checkpoint::receive(zeros, "folder", packed);
    checkpoint.require_same_tensors(state);
    std::vector<std::vector<std::byte>> memory;
    std::vector<Target> targets;
    for (int b = 0; b < static_cast<int>(state.buffers.size()); ++b) {
      const StoredBuffer& buffer = state.buffer(b);
      for (int a = 0; a < static_cast<int>(buffer.arrays.size()); ++a) {
        const auto width = mics::bytes_of(buffer.arrays[static_cast<std::size_t>(a)].dtype);
        memory.emplace_back(static_cast<std::size_t>(buffer.count * width), std::byte{1});
        targets.push_back({b, a, {0, buffer.count}, memory.back().data()});
      }
    }
    checkpoint.read(state, targets);
    for (const std::vector<std::byte>& bytes : memory) {
      require(
          std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{}; }));
    }
  } catch (const mics::FormatError& error) {
    mics::fuzz::require_one_line(error.what());
  }
}

}  // namespace

// The bytes are the description of a manifest, in JSON; behind a byte 0xFF stand the words of the
// index, which are those that the description asks for if there is no such byte.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::vector<std::string> parts = mics::fuzz::parts_of(data, size);
  const std::optional<detail::Description> description = describe(parts.front());
  if (!description) return 0;
  const StoredState& state = description->state;
  if (scalars_of(state) > most_scalars) return 0;
  check_pieces(*description);
  const std::vector<std::string> paths = detail::tensor_paths(state.tensors);
  require(std::set(paths.begin(), paths.end()).size() == paths.size());

  std::vector<std::uint32_t> crcs;
  std::vector<std::uint32_t> digests;
  if (parts.size() > 1) {
    std::vector<std::uint32_t> words(parts[1].size() / sizeof(std::uint32_t));
    if (!words.empty()) std::memcpy(words.data(), parts[1].data(), 4 * words.size());
    crcs.assign(words.begin(), words.begin() + static_cast<std::ptrdiff_t>(words.size() / 2));
    digests.assign(words.begin() + static_cast<std::ptrdiff_t>(words.size() / 2), words.end());
  } else {
    std::int64_t bytes = 0;
    for (const detail::Piece& piece : description->pieces) {
      if (piece.bytes > most_file_bytes) return 0;
      bytes += piece.bytes;
    }
    if (bytes > most_file_bytes) return 0;
    const std::vector<std::byte> zeros(static_cast<std::size_t>(detail::crc_block_bytes));
    for (const detail::Piece& piece : description->pieces) {
      for (std::int64_t at = 0; at < piece.bytes; at += detail::crc_block_bytes) {
        crcs.push_back(crc32c(std::span(zeros).first(
            static_cast<std::size_t>(std::min(detail::crc_block_bytes, piece.bytes - at)))));
      }
    }
    for (const StoredBuffer& buffer : state.buffers) {
      digests.resize(digests.size() + buffer.arrays.size() * buffer.segments.size());
    }
  }
  const std::vector<std::byte> manifest = manifest_of(parts.front(), &*description, crcs, digests);
  load(*description, manifest, crc32c(manifest));
  return 0;
}
