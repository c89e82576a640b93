// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/file_buffer.hpp>
#include <mics/checkpoint/detail/io_threads.hpp>
#include <mics/checkpoint/detail/piece.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/writer.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <future>
#include <map>
#include <unordered_map>

namespace mics::checkpoint {
namespace {

using layout::intersection;
using layout::Interval;
using layout::round_up;

constexpr std::int64_t chunk_bytes = detail::request_bytes;
constexpr std::int64_t block_bytes = detail::crc_block_bytes;

std::string shape_text(const StoredTensor& tensor) {
  std::string text = "(";
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
    text += (i == 0 ? "" : ", ") + std::to_string(tensor.shape[i]);
  }
  text += ')';
  if (tensor.complex) text += " complex";
  if (tensor.layout == MemoryLayout::left) text += " column-major";
  return text;
}

// Weights are the same thing under two names.
bool stands_for(const StoredArray& stored, const StoredArray& wanted) {
  const auto is_weights = [](std::string_view name) {
    return name == master_weights || name == frozen_weights;
  };
  return stored.name == wanted.name || (is_weights(stored.name) && is_weights(wanted.name));
}

// Scalars that lie end to end in a file and in memory.
struct Item {
  std::int64_t offset = 0;  // in the file
  std::int64_t count = 0;   // scalars
  DType stored = DType::fp32;
  DType wanted = DType::fp32;
  std::byte* data = nullptr;
  std::size_t target = 0;            // index
  Interval range;                    // scalars of the target's buffer
  std::uint32_t crc = 0;             // of what is in memory, where the dtype is kept
  std::int64_t done = 0;             // scalars converted
  std::array<std::byte, 8> carry{};  // of a scalar that two chunks share
  std::int64_t carried = 0;

  [[nodiscard]] std::int64_t bytes() const { return count * bytes_of(stored); }
  [[nodiscard]] Interval in_file() const { return {offset, bytes()}; }
};

void convert(const std::byte* from, DType stored, std::byte* to, DType wanted, std::int64_t count) {
  visit(stored, [&](auto stored_tag) {
    visit(wanted, [&](auto wanted_tag) {
      using From = typename decltype(stored_tag)::type;
      using To = typename decltype(wanted_tag)::type;
      for (std::int64_t i = 0; i < count; ++i) {
        From value;
        std::memcpy(&value, from + i * static_cast<std::int64_t>(sizeof(From)), sizeof(From));
        // Through fp64, which holds every value of the others: one rounding.
        const To result = static_cast<To>(static_cast<double>(value));
        std::memcpy(to + i * static_cast<std::int64_t>(sizeof(To)), &result, sizeof(To));
      }
    });
  });
}

// True if every byte of `here` in the file is one of the item's, which keeps its dtype.
bool is_whole(const Item& item, const Interval& here) {
  return item.stored == item.wanted && intersection(item.in_file(), here) == here;
}

// Takes the bytes of `item` that lie in `chunk`, which begins at `offset` of the file. What is
// summed is the memory that was written, while the processor's caches hold it.
void take(Item& item, std::span<const std::byte> chunk, std::int64_t offset) {
  const Interval part = intersection(item.in_file(), {offset, std::ssize(chunk)});
  if (part.empty()) return;
  const std::byte* from = chunk.data() + (part.offset - offset);
  if (item.stored == item.wanted) {
    std::byte* const to = item.data + (part.offset - item.offset);
    const auto bytes = static_cast<std::size_t>(part.length);
    std::memcpy(to, from, bytes);
    item.crc = crc32c({to, bytes}, item.crc);
    return;
  }
  // Chunks come in order. A scalar at the border of two is put together first.
  const std::int64_t width = bytes_of(item.stored);
  std::int64_t bytes = part.length;
  const auto put = [&](const std::byte* scalars, std::int64_t count) {
    convert(scalars, item.stored, item.data + item.done * bytes_of(item.wanted), item.wanted,
            count);
    item.done += count;
  };
  while (item.carried > 0 && bytes > 0) {
    item.carry[static_cast<std::size_t>(item.carried++)] = *from++;
    --bytes;
    if (item.carried == width) {
      put(item.carry.data(), 1);
      item.carried = 0;
    }
  }
  put(from, bytes / width);
  item.carried += bytes % width;
  std::memcpy(item.carry.data(), from + bytes / width * width,
              static_cast<std::size_t>(bytes % width));
}

// Where the parts of arrays lie in the pieces of one checkpoint.
class Locations {
 public:
  explicit Locations(const detail::Description& description) : description_(description) {}

  // Calls `found(piece, file offset, range of the buffer)` for each stretch of `range`.
  template <class Found>
  void find(int buffer, int array, const Interval& range, Found&& found) {
    const StoredState& state = description_.state;
    const std::int64_t shard_count = state.shard_count(buffer);
    std::int64_t at = range.offset;
    while (at < range.end()) {
      detail::PieceId id{static_cast<int>(at / shard_count), 0};
      Interval part = part_of_shard(state, buffer, id, description_.parts);
      // The first guess is short by rounding at most.
      id.part =
          static_cast<int>((at - part.offset) / 256 * description_.parts / (shard_count / 256));
      part = part_of_shard(state, buffer, id, description_.parts);
      while (part.end() <= at) {
        ++id.part;
        part = part_of_shard(state, buffer, id, description_.parts);
      }
      const Interval here = intersection(part, range);
      const int piece = piece_index(id, description_.parts);
      for (const Stretch& stretch : stretches(piece, buffer, array)) {
        const Interval wanted = intersection(stretch.range, here);
        if (wanted.empty()) continue;
        found(piece, stretch.offset + (wanted.offset - stretch.range.offset) * stretch.width,
              wanted);
      }
      at = here.end();
    }
  }

 private:
  struct Stretch {
    Interval range;           // scalars of the buffer
    std::int64_t offset = 0;  // in the file
    std::int64_t width = 0;
  };
  using Key = std::pair<int, int>;  // buffer, array

  const std::vector<Stretch>& stretches(int piece, int buffer, int array) {
    auto& of_piece = pieces_[piece];
    if (of_piece.empty()) {
      const detail::PieceId id = detail::piece_id(piece, description_.parts);
      const std::vector<detail::PieceDataset> contents =
          detail::piece_contents(description_.state, id, description_.parts);
      const detail::Piece& file = description_.pieces[static_cast<std::size_t>(piece)];
      if (contents.size() != file.offsets.size()) {
        raise<FormatError>({.object = "description of " + file.file,
                            .expected = std::to_string(contents.size()) + " datasets",
                            .found = std::to_string(file.offsets.size())});
      }
      for (std::size_t d = 0; d < contents.size(); ++d) {
        const std::int64_t width = bytes_of(contents[d].dtype);
        if (file.offsets[d] < 0 || file.offsets[d] > file.bytes - contents[d].bytes()) {
          raise<FormatError>(
              {.object = "dataset " + in_quotes(contents[d].path()) + " of " + file.file,
               .expected = "a place inside the file",
               .found = "offset " + std::to_string(file.offsets[d])});
        }
        for (const detail::Run& run : contents[d].runs) {
          of_piece[{run.buffer, run.array}].push_back(
              {run.range, file.offsets[d] + run.offset * width, width});
        }
      }
    }
    return of_piece[{buffer, array}];
  }

  const detail::Description& description_;
  std::map<int, std::map<Key, std::vector<Stretch>>> pieces_;
};

// Reads the blocks of a file that hold `items`, ascending, verifies and hands them on.
class PieceReader {
 public:
  PieceReader(SystemCalls& calls, const std::filesystem::path& folder, const detail::Piece& piece,
              std::span<const std::uint32_t> crcs, std::byte* memory, detail::IoThreads& threads,
              const std::stop_token& stop)
      : piece_(piece),
        crcs_(crcs),
        threads_(threads),
        stop_(stop),
        file_(calls, folder / piece.file, Access::read_direct),
        memory_(memory) {}

  // Calls `taken` with each item that is complete.
  template <class Taken>
  std::int64_t run(std::span<Item> items, Taken&& taken) {
    std::sort(items.begin(), items.end(),
              [](const Item& a, const Item& b) { return a.offset < b.offset; });
    const std::vector<Interval> chunks = chunks_of(items);
    std::int64_t bytes = 0;
    std::size_t first = 0;
    // Some chunks are read while the one before is used.
    detail::Requests reads;
    std::size_t ahead = 0;
    for (std::size_t i = 0; i < chunks.size(); ++i) {
      if (stop_.stop_requested()) {
        raise<StateError>({.object = "read of " + piece_.file,
                           .expected = "to be wanted to the end",
                           .found = "a request to stop"});
      }
      for (; ahead < std::min(chunks.size(), i + detail::request_count); ++ahead) {
        const std::size_t turn = ahead % detail::request_count;
        const auto read = [this, chunk = chunks[ahead], turn] { this->read(chunk, turn); };
        if (chunks.size() == 1) {
          read();
        } else {
          reads.begin(turn, threads_, std::packaged_task<void()>(read));
        }
      }
      reads.finish(i % detail::request_count);
      use(chunks[i], i % detail::request_count, items, first, taken);
      bytes += chunks[i].length;
    }
    return bytes;
  }

 private:
  [[nodiscard]] std::vector<Interval> chunks_of(std::span<const Item> items) const {
    std::vector<Interval> chunks;
    for (const Item& item : items) {
      std::int64_t begin = item.offset / block_bytes * block_bytes;
      const std::int64_t end = std::min(round_up(item.in_file().end(), block_bytes), piece_.bytes);
      if (!chunks.empty()) begin = std::max(begin, chunks.back().end());
      while (begin < end) {
        if (chunks.empty() || chunks.back().end() != begin || chunks.back().length == chunk_bytes) {
          chunks.push_back({begin, 0});
        }
        const std::int64_t more = std::min(end - begin, chunk_bytes - chunks.back().length);
        chunks.back().length += more;
        begin += more;
      }
    }
    return chunks;
  }

  [[nodiscard]] std::span<std::byte> buffer(std::size_t turn, std::int64_t bytes) const {
    return {memory_ + static_cast<std::int64_t>(turn) * chunk_bytes,
            static_cast<std::size_t>(bytes)};
  }

  void read(const Interval& chunk, std::size_t turn) const {
    if (file_.direct()) {
      const std::int64_t found =
          file_.read_some(buffer(turn, round_up(chunk.length, direct_alignment)), chunk.offset);
      if (found >= chunk.length) return;
    }
    // Tells where a file that is cut short ends.
    if (!file_.direct()) file_.read(buffer(turn, chunk.length), chunk.offset);
    if (file_.direct()) {
      raise<FormatError>({.object = piece_.file,
                          .expected = "bytes up to " + std::to_string(chunk.end()),
                          .found = "an earlier end",
                          .remedy = "the file was cut short"});
    }
  }

  template <class Taken>
  void use(const Interval& chunk, std::size_t turn, std::span<Item> items, std::size_t& first,
           Taken& taken) {
    const std::span<const std::byte> bytes = buffer(turn, chunk.length);
    for (std::int64_t at = 0; at < chunk.length; at += block_bytes) {
      const Interval here{chunk.offset + at, std::min(block_bytes, chunk.length - at)};
      const auto index = static_cast<std::size_t>(here.offset / block_bytes);
      const std::span<const std::byte> block =
          bytes.subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(here.length));
      const auto require = [&](std::uint32_t crc) {
        if (crc == crcs_[index]) return;
        raise<FormatError>({.object = "MiB " + std::to_string(index) + " of " + piece_.file,
                            .expected = "CRC-32C " + hex(crcs_[index]),
                            .found = hex(crc),
                            .remedy = "the file is damaged or another's"});
      };
      while (first < items.size() && items[first].in_file().end() <= here.offset) ++first;
      const bool alone = first + 1 == items.size() ||
                         (first + 1 < items.size() && items[first + 1].offset >= here.end());
      if (alone && is_whole(items[first], here)) {
        // One sum serves the block and the digest: that of the memory that was written.
        Item& item = items[first];
        std::byte* const to = item.data + (here.offset - item.offset);
        std::memcpy(to, block.data(), block.size());
        const std::uint32_t crc = crc32c({to, block.size()});
        require(crc);
        item.crc = crc32c_combine(item.crc, crc, here.length);
        if (item.in_file().end() == here.end()) taken(item);
        continue;
      }
      require(crc32c(block));
      for (std::size_t i = first; i < items.size() && items[i].offset < here.end(); ++i) {
        const std::int64_t end = items[i].in_file().end();
        take(items[i], block, here.offset);
        if (end > here.offset && end <= here.end()) taken(items[i]);
      }
    }
  }

  const detail::Piece& piece_;
  std::span<const std::uint32_t> crcs_;
  detail::IoThreads& threads_;
  const std::stop_token& stop_;
  File file_;
  std::byte* memory_;
};

}  // namespace

Checkpoint::Checkpoint(SystemCalls& calls, std::filesystem::path folder, Commit commit,
                       std::vector<std::byte> manifest)
    : calls_(&calls),
      folder_(std::move(folder)),
      commit_(std::move(commit)),
      manifest_(std::move(manifest)) {
  const std::string object = in_quotes((folder_ / detail::manifest_name).string());
  if (commit_.files.empty() || commit_.files.front().name != detail::manifest_name) {
    raise<FormatError>({.object = in_quotes((folder_ / commit_name).string()),
                        .expected = std::string(detail::manifest_name) + " as its first file",
                        .found = "another"});
  }
  const CommittedFile& expected = commit_.files.front();
  const std::uint32_t crc = crc32c(manifest_);
  if (std::ssize(manifest_) != expected.bytes || crc != expected.crc) {
    raise<FormatError>(
        {.object = object,
         .expected = std::to_string(expected.bytes) + " bytes with CRC-32C " + hex(expected.crc),
         .found = std::to_string(manifest_.size()) + " with " + hex(crc),
         .remedy = "the file is damaged or another's"});
  }
  try {
    const h5::Session session;
    contents_ = std::make_shared<detail::ManifestContents>(detail::read_manifest(manifest_));
  } catch (const IoError& error) {
    raise<FormatError>({.object = object, .expected = "a manifest", .found = error.what()});
  }
  const detail::Description& description = contents_->description;
  bool same = description.state.step == commit_.step && description.id == commit_.id &&
              description.state.grid == commit_.grid &&
              description.pieces.size() + 1 == commit_.files.size();
  for (std::size_t i = 0; same && i < description.pieces.size(); ++i) {
    same = description.pieces[i].file == commit_.files[i + 1].name &&
           description.pieces[i].bytes == commit_.files[i + 1].bytes;
  }
  if (!same) {
    raise<FormatError>({.object = object,
                        .expected = "the step, save and files of " + std::string(commit_name),
                        .found = "others"});
  }
  require_room();
  const std::uint32_t digest = state_digest(state(), contents_->digests);
  if (digest != commit_.digest) {
    raise<FormatError>({.object = in_quotes((folder_ / commit_name).string()),
                        .expected = "digest " + hex(digest) + ", that of the manifest's digests",
                        .found = hex(commit_.digest)});
  }
  for (std::size_t i = 0; i < state().tensors.size(); ++i) {
    index_[state().tensors[i].name] = static_cast<int>(i);
  }
  places_.resize(state().tensors.size());
  for (std::size_t b = 0; b < state().buffers.size(); ++b) {
    const StoredBuffer& buffer = state().buffers[b];
    for (std::size_t s = 0; s < buffer.segments.size(); ++s) {
      places_[static_cast<std::size_t>(buffer.segments[s].tensor)] = {static_cast<int>(b),
                                                                      static_cast<int>(s)};
    }
  }
}

// Sizes that a forged description claims must not become allocations.
void Checkpoint::require_room() const {
  std::int64_t room = 0;
  for (const detail::Piece& piece : contents_->description.pieces) {
    room += std::min(piece.bytes, INT64_MAX - room);
  }
  const std::int64_t most = room;
  for (const StoredBuffer& buffer : state().buffers) {
    for (const StoredArray& array : buffer.arrays) {
      const std::int64_t bytes = buffer.count * bytes_of(array.dtype);
      if (bytes <= room) {
        room -= bytes;
        continue;
      }
      raise<FormatError>(
          {.object = array.name + " of buffer " + in_quotes(buffer.name) + " in " +
                     in_quotes((folder_ / detail::manifest_name).string()),
           .expected = "arrays that fit into pieces of " + std::to_string(most) + " bytes",
           .found = std::to_string(bytes) + " bytes where " + std::to_string(room) + " are left"});
    }
  }
}

Checkpoint Checkpoint::open(SystemCalls& calls, const std::filesystem::path& folder) {
  return receive(calls, folder, fetch(calls, folder));
}

// The length of COMMIT, COMMIT, the manifest.
std::vector<std::byte> Checkpoint::fetch(SystemCalls& calls, const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / commit_name;
  const std::vector<std::byte> text = read_file(calls, path, std::int64_t{1} << 30);
  const Commit commit = parse_commit({reinterpret_cast<const char*>(text.data()), text.size()},
                                     in_quotes(path.string()));
  // Where a copy of a step was renamed, its own number counts, and misleads.
  const auto number = parse_step_name(folder.filename().string());
  if (number && *number != commit.step) {
    raise<FormatError>({.object = in_quotes(path.string()),
                        .expected = "step " + std::to_string(*number),
                        .found = "step " + std::to_string(commit.step)});
  }
  for (const CommittedFile& file : commit.files) {
    const std::int64_t bytes = File(calls, folder / file.name, Access::read).bytes();
    if (bytes == file.bytes) continue;
    raise<FormatError>({.object = in_quotes((folder / file.name).string()),
                        .expected = std::to_string(file.bytes) + " bytes",
                        .found = std::to_string(bytes),
                        .remedy = "the file is damaged or another's"});
  }
  std::vector<std::byte> manifest;
  if (!commit.files.empty()) {
    manifest = read_file(calls, folder / detail::manifest_name, commit.files.front().bytes);
  }
  const auto length = static_cast<std::uint64_t>(text.size());
  std::vector<std::byte> bytes(sizeof(length));
  std::memcpy(bytes.data(), &length, sizeof(length));
  bytes.insert(bytes.end(), text.begin(), text.end());
  bytes.insert(bytes.end(), manifest.begin(), manifest.end());
  return bytes;
}

Checkpoint Checkpoint::receive(SystemCalls& calls, const std::filesystem::path& folder,
                               std::span<const std::byte> bytes) {
  std::uint64_t length = 0;
  if (bytes.size() >= sizeof(length)) std::memcpy(&length, bytes.data(), sizeof(length));
  if (bytes.size() < sizeof(length) || length > bytes.size() - sizeof(length)) {
    raise<ArgumentError>({.object = "packed checkpoint",
                          .expected = "the bytes of fetch()",
                          .found = std::to_string(bytes.size()) + " others"});
  }
  const std::span<const std::byte> text = bytes.subspan(sizeof(length), length);
  Commit commit = parse_commit({reinterpret_cast<const char*>(text.data()), text.size()},
                               in_quotes((folder / commit_name).string()));
  const auto rest = bytes.subspan(sizeof(length) + length);
  return {calls, folder, std::move(commit), {rest.begin(), rest.end()}};
}

int Checkpoint::find_tensor(std::string_view name) const {
  const auto found = index_.find(name);
  return found == index_.end() ? -1 : found->second;
}

std::optional<std::uint32_t> Checkpoint::digest_of(int tensor, const StoredArray& array) const {
  const auto [in, segment] = places_[static_cast<std::size_t>(tensor)];
  std::size_t at = 0;
  for (int b = 0; b < in; ++b)
    at += state().buffer(b).arrays.size() * state().buffer(b).segments.size();
  const StoredBuffer& buffer = state().buffer(in);
  for (const StoredArray& stored : buffer.arrays) {
    if (stands_for(stored, array)) {
      if (stored.dtype != array.dtype) return {};
      return contents_->digests[at + static_cast<std::size_t>(segment)];
    }
    at += buffer.segments.size();
  }
  return {};
}

std::int64_t Checkpoint::updates_of(int tensor) const {
  return state().buffer(places_[static_cast<std::size_t>(tensor)].first).updates;
}

std::int64_t Checkpoint::updates_for(const StoredState& target, int buffer) const {
  std::optional<std::int64_t> updates;
  for (const StoredSegment& segment : target.buffer(buffer).segments) {
    const std::string& name = target.tensor(segment.tensor).name;
    const int tensor = find_tensor(name);
    if (tensor < 0) continue;
    const std::int64_t here = updates_of(tensor);
    if (updates && *updates != here) {
      raise<FormatError>(
          {.object = "tensor " + in_quotes(name),
           .expected = std::to_string(*updates) + " updates, as the tensors before it in buffer " +
                       in_quotes(target.buffer(buffer).name),
           .found = std::to_string(here),
           .remedy = "keep the units and persistence thresholds with which it was saved"});
    }
    updates = here;
  }
  return updates.value_or(0);
}

void Checkpoint::require_same_tensors(const StoredState& target) const {
  std::unordered_map<std::string_view, const StoredTensor*> here;
  for (const StoredTensor& tensor : state().tensors) here[tensor.name] = &tensor;
  const std::string where = " of the model in " + in_quotes(folder_.string());
  for (const StoredTensor& tensor : target.tensors) {
    const auto found = here.find(tensor.name);
    const std::string object = "parameter " + in_quotes(tensor.name);
    if (found == here.end()) {
      raise<FormatError>({.object = object + where,
                          .expected = "shape " + shape_text(tensor),
                          .found = "no such parameter"});
    }
    const StoredTensor& stored = *found->second;
    if (stored.shape != tensor.shape || stored.complex != tensor.complex ||
        stored.layout != tensor.layout) {
      raise<FormatError>({.object = object + where,
                          .expected = "shape " + shape_text(tensor),
                          .found = shape_text(stored)});
    }
    here.erase(found);
  }
  for (const StoredTensor& tensor : state().tensors) {
    if (!here.contains(tensor.name)) continue;
    raise<FormatError>({.object = "parameter " + in_quotes(tensor.name) + where,
                        .expected = "no such parameter",
                        .found = "shape " + shape_text(tensor)});
  }
}

void Checkpoint::require_arrays(const StoredState& target, std::span<const Target> targets) const {
  for (const Target& to : targets) {
    const StoredBuffer& buffer = target.buffer(to.buffer);
    const StoredArray& array = buffer.arrays[static_cast<std::size_t>(to.array)];
    for (const StoredSegment& segment : buffer.segments) {
      const std::string& name = target.tensor(segment.tensor).name;
      const int tensor = find_tensor(name);
      const auto& arrays = state().buffer(places_[static_cast<std::size_t>(tensor)].first).arrays;
      std::string there;
      for (const StoredArray& stored : arrays) there += (there.empty() ? "" : ", ") + stored.name;
      if (std::ranges::any_of(arrays,
                              [&](const auto& stored) { return stands_for(stored, array); })) {
        continue;
      }
      raise<FormatError>({.object = array.name + " of parameter " + in_quotes(name) + " in " +
                                    in_quotes(folder_.string()),
                          .expected = "to be there",
                          .found = "no such array beside " + there,
                          .remedy = "go on with the optimizer and the frozen parameters of the "
                                    "save, or load the weights only"});
    }
  }
}

std::int64_t Checkpoint::require_same_digests(
    const StoredState& target, std::span<const std::uint32_t> digests,
    const std::function<bool(int buffer, int array)>& wanted) const {
  std::int64_t compared = 0;
  std::size_t next = 0;
  for (std::size_t b = 0; b < target.buffers.size(); ++b) {
    const StoredBuffer& buffer = target.buffers[b];
    for (std::size_t a = 0; a < buffer.arrays.size(); ++a) {
      const bool is_wanted = wanted(static_cast<int>(b), static_cast<int>(a));
      for (const StoredSegment& segment : buffer.segments) {
        const std::uint32_t found = digests[next++];
        if (!is_wanted) continue;
        const std::string& name = target.tensor(segment.tensor).name;
        const auto expected = digest_of(find_tensor(name), buffer.arrays[a]);
        if (!expected) continue;
        ++compared;
        if (*expected == found) continue;
        raise<FormatError>({.object = buffer.arrays[a].name + " of parameter " + in_quotes(name) +
                                      " loaded from " + in_quotes(folder_.string()),
                            .expected = "digest " + hex(*expected),
                            .found = hex(found)});
      }
    }
  }
  return compared;
}

ReadCount Checkpoint::read(const StoredState& target, std::span<const Target> targets,
                           const Filled& filled, const std::stop_token& stop) const {
  Locations locations(contents_->description);
  std::map<int, std::vector<Item>> items;             // of each piece
  std::vector<std::int64_t> missing(targets.size());  // items of each target
  for (std::size_t t = 0; t < targets.size(); ++t) {
    const Target& to = targets[t];
    const StoredBuffer& buffer = target.buffer(to.buffer);
    const StoredArray& array = buffer.arrays[static_cast<std::size_t>(to.array)];
    const std::int64_t width = bytes_of(array.dtype);
    const auto clear = [&](std::int64_t begin, std::int64_t end) {
      if (end <= begin) return;
      std::memset(to.data + (begin - to.range.offset) * width, 0,
                  static_cast<std::size_t>((end - begin) * width));
    };
    std::int64_t end = to.range.offset;
    for (const detail::TensorPart& part : detail::tensor_parts(buffer, to.range)) {
      clear(end, part.range.offset);
      end = part.range.end();
      const StoredSegment& segment = buffer.segments[static_cast<std::size_t>(part.segment)];
      const StoredTensor& tensor = target.tensor(segment.tensor);
      const int found = find_tensor(tensor.name);
      const auto refuse = [&](const std::string& what) {
        raise<FormatError>({.object = array.name + " of parameter " + in_quotes(tensor.name) +
                                      " in " + in_quotes(folder_.string()),
                            .expected = "to be there",
                            .found = what});
      };
      if (found < 0) refuse("no such parameter");
      const StoredTensor& stored = state().tensor(found);
      if (stored.scalars() != tensor.scalars() || stored.layout != tensor.layout) {
        refuse("shape " + shape_text(stored) + " for " + shape_text(tensor));
      }
      const auto [from_buffer, from_segment] = places_[static_cast<std::size_t>(found)];
      const StoredBuffer& from = state().buffer(from_buffer);
      const auto same =
          std::find_if(from.arrays.begin(), from.arrays.end(),
                       [&](const StoredArray& candidate) { return stands_for(candidate, array); });
      if (same == from.arrays.end()) refuse("no such array");
      const std::int64_t shift =
          from.segments[static_cast<std::size_t>(from_segment)].range.offset - segment.range.offset;
      locations.find(from_buffer, static_cast<int>(same - from.arrays.begin()),
                     {part.range.offset + shift, part.range.length},
                     [&](int piece, std::int64_t offset, const Interval& range) {
                       Item item{.offset = offset,
                                 .count = range.length,
                                 .stored = same->dtype,
                                 .wanted = array.dtype,
                                 .data = to.data + (range.offset - shift - to.range.offset) * width,
                                 .target = t,
                                 .range = {range.offset - shift, range.length}};
                       items[piece].push_back(item);
                       ++missing[t];
                     });
    }
    clear(end, to.range.end());
  }

  ReadCount count;
  for (std::size_t t = 0; filled && t < targets.size(); ++t) {
    if (missing[t] == 0) filled(t);
  }
  if (items.empty()) return count;
  const auto taken = [&](const Item& item) {
    const Target& to = targets[item.target];
    if (item.stored == item.wanted) {
      count.sums.push_back({to.buffer, to.array, item.range, item.crc});
    }
    if (--missing[item.target] == 0 && filled) filled(item.target);
  };
  const detail::FileBuffer memory = detail::make_file_buffer(detail::request_memory);
  detail::IoThreads threads;
  for (auto& [piece, of_piece] : items) {
    const auto i = static_cast<std::size_t>(piece);
    PieceReader reader(*calls_, folder_, contents_->description.pieces[i], contents_->block_crcs[i],
                       memory.get(), threads, stop);
    count.bytes += reader.run(of_piece, taken);
    ++count.files;
  }
  return count;
}

std::optional<Checkpoint> open_newest(SystemCalls& calls, const std::filesystem::path& directory,
                                      const LogSink& log) {
  std::vector<std::int64_t> steps = list_steps(directory);
  for (std::size_t i = 0; i < steps.size();) {
    const std::int64_t step = steps[i++];
    const StepWatch watch(calls, directory / step_name(step));
    try {
      return Checkpoint::open(calls, directory / step_name(step));
    } catch (const Error& error) {
      if (watch.fate() != StepWatch::Fate::same) {
        // A newer one may have come since.
        steps = list_steps(directory);
        i = 0;
        continue;
      }
      if (log) {
        log(LogLevel::warning, std::string(error.what()) + "; step " + std::to_string(step) +
                                   " is passed over for an older one");
      }
    }
  }
  return {};
}

}  // namespace mics::checkpoint
