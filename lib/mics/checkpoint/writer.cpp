// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/version.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/file_buffer.hpp>
#include <mics/checkpoint/detail/io_threads.hpp>
#include <mics/checkpoint/writer.hpp>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <functional>
#include <future>
#include <random>
#include <utility>

namespace mics::checkpoint {
namespace {

using layout::intersection;
using layout::Interval;
using layout::round_up;

static_assert(detail::request_bytes % detail::crc_block_bytes == 0);

std::string now() {
  const std::time_t seconds = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&seconds, &utc);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text.data();
}

}  // namespace

int parts_of_shard(const StoredState& state, const PieceSize& size) {
  const int replicas = state.grid.replicas();
  if (state.grid.slices > 1) return replicas;
  std::int64_t bytes = 0;
  for (int b = 0; b < static_cast<int>(state.buffers.size()); ++b) {
    for (const StoredArray& array : state.buffer(b).arrays) {
      bytes += state.shard_count(b) * bytes_of(array.dtype);
    }
  }
  std::int64_t parts = replicas;
  if (size.min_bytes > 0) parts = std::min(parts, bytes / size.min_bytes);
  if (size.max_parts > 0) parts = std::min<std::int64_t>(parts, size.max_parts);
  return static_cast<int>(std::max<std::int64_t>(parts, 1));
}

std::optional<int> part_of_replica(int replica, int replicas, int parts) {
  // Part k is replica floor(k R / K)'s, so that replica r's is the smallest k with k R / K >= r.
  const auto part = static_cast<int>((std::int64_t{replica} * parts + replicas - 1) / replicas);
  if (part >= parts || std::int64_t{part} * replicas / parts != replica) return {};
  return part;
}

Interval written_range(const StoredState& state, const layout::Place& place, int buffer,
                       const PieceSize& size) {
  const int parts = parts_of_shard(state, size);
  const auto part = part_of_replica(place.group, state.grid.replicas(), parts);
  if (!part) return {state.shard(buffer, place.shard).offset, 0};
  return detail::part_of_shard(state, buffer, {place.shard, *part}, parts);
}

std::string make_save_id() {
  std::random_device random;
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%08x%08x", random(), random());
  return text.data();
}

PieceWriter::PieceWriter(const StoredState& state, detail::PieceId id, int parts,
                         std::string_view save_id)
    : id_(id), contents_(detail::piece_contents(state, id, parts)) {
  const h5::Session session;
  skeleton_ = detail::make_skeleton(state, contents_, id, parts, save_id, piece_);
  for (const detail::PieceDataset& dataset : contents_) {
    for (const detail::Run& run : dataset.runs) {
      auto& stretches = runs_.emplace_back();
      std::int64_t end = run.range.offset;
      for (const detail::TensorPart& part :
           detail::tensor_parts(state.buffer(run.buffer), run.range)) {
        if (part.range.offset > end) stretches.push_back({{end, part.range.offset - end}, -1});
        stretches.push_back({part.range, static_cast<int>(parts_++)});
        end = part.range.end();
      }
      if (run.range.end() > end) stretches.push_back({{end, run.range.end() - end}, -1});
    }
  }
}

std::int64_t PieceWriter::payload_bytes() const {
  std::int64_t bytes = 0;
  for (const detail::PieceDataset& dataset : contents_) bytes += dataset.bytes();
  return bytes;
}

template <class DataOf>
void PieceWriter::make_fragments(DataOf&& data_of) {
  fragments_.clear();
  std::size_t next_run = 0;
  for (std::size_t d = 0; d < contents_.size(); ++d) {
    const std::int64_t width = bytes_of(contents_[d].dtype);
    for (const detail::Run& run : contents_[d].runs) {
      const std::pair<const std::byte*, int> origin = data_of(contents_[d], run);
      const std::byte* const begin = origin.first;
      for (const auto& [range, part] : runs_[next_run]) {
        const std::int64_t at = range.offset - run.range.offset;
        fragments_.push_back({piece_.offsets[d] + (run.offset + at) * width, range.length * width,
                              begin == nullptr ? nullptr : begin + at * width, part,
                              origin.second});
      }
      ++next_run;
    }
  }
  // libhdf5 may have put a later, smaller dataset into a gap before an earlier one.
  std::sort(fragments_.begin(), fragments_.end(),
            [](const Fragment& a, const Fragment& b) { return a.offset < b.offset; });
}

void PieceWriter::attach(std::span<const Source> sources) {
  supply_ = {};
  make_fragments([&](const detail::PieceDataset& dataset, const detail::Run& run) {
    const auto source = std::find_if(sources.begin(), sources.end(), [&](const Source& s) {
      return s.buffer == run.buffer && s.array == run.array && s.data != nullptr &&
             intersection(s.range, run.range) == run.range;
    });
    if (source == sources.end()) {
      raise<ArgumentError>({.object = "array " + std::to_string(run.array) + " of buffer " +
                                      std::to_string(run.buffer),
                            .expected = "memory for scalars " + std::to_string(run.range.offset) +
                                        " to " + std::to_string(run.range.end()),
                            .found = "none"});
    }
    return std::pair(
        source->data + (run.range.offset - source->range.offset) * bytes_of(dataset.dtype),
        static_cast<int>(source - sources.begin()));
  });
}

void PieceWriter::attach(Supply supply) {
  supply_ = std::move(supply);
  make_fragments([](const detail::PieceDataset&, const detail::Run&) {
    return std::pair<const std::byte*, int>(nullptr, -1);
  });
}

std::vector<Copy> PieceWriter::stage(std::span<const Source> sources, std::span<std::byte> buffer) {
  if (std::ssize(buffer) != payload_bytes()) {
    raise<ArgumentError>({.object = "memory to stage a piece in",
                          .expected = std::to_string(payload_bytes()) + " bytes",
                          .found = std::to_string(buffer.size())});
  }
  attach(sources);
  std::vector<Copy> copies;
  std::byte* to = buffer.data();
  for (Fragment& fragment : fragments_) {
    copies.push_back({fragment.source, fragment.data, to, fragment.bytes});
    fragment.data = to;
    to += fragment.bytes;
  }
  std::sort(copies.begin(), copies.end(), [](const Copy& a, const Copy& b) {
    return a.source != b.source ? a.source < b.source : std::less<>()(a.from, b.from);
  });
  return copies;
}

// Puts the file's bytes [offset, offset + chunk.size()) together and sums them.
void PieceWriter::fill(std::span<std::byte> chunk, std::int64_t offset, std::size_t& next,
                       PieceSums& sums) const {
  for (std::int64_t done = 0; done < std::ssize(chunk); done += detail::crc_block_bytes) {
    const std::span<std::byte> block = chunk.subspan(
        static_cast<std::size_t>(done),
        static_cast<std::size_t>(std::min(detail::crc_block_bytes, std::ssize(chunk) - done)));
    const Interval here{offset + done, std::ssize(block)};
    const auto place = [&](const std::byte* from, const Interval& at) {
      std::memcpy(block.data() + (at.offset - here.offset), from,
                  static_cast<std::size_t>(at.length));
    };
    const bool whole = next < fragments_.size() && fragments_[next].offset <= here.offset &&
                       fragments_[next].offset + fragments_[next].bytes >= here.end();
    if (!whole) {
      std::fill(block.begin(), block.end(), std::byte{0});
      const Interval head = intersection({0, std::ssize(skeleton_.head)}, here);
      if (!head.empty()) place(skeleton_.head.data() + head.offset, head);
    }
    std::optional<int> whole_part;
    while (next < fragments_.size() && fragments_[next].offset < here.end()) {
      const Fragment& fragment = fragments_[next];
      const Interval all{fragment.offset, fragment.bytes};
      const Interval part = intersection(all, here);
      const std::byte* const from =
          supply_ ? supply_(part) : fragment.data + (part.offset - fragment.offset);
      place(from, part);
      if (fragment.part >= 0) {
        if (whole) {
          whole_part = fragment.part;
        } else {
          std::uint32_t& crc = sums.part_crcs[static_cast<std::size_t>(fragment.part)];
          crc = crc32c(block.subspan(static_cast<std::size_t>(part.offset - here.offset),
                                     static_cast<std::size_t>(part.length)),
                       crc);
        }
      }
      if (all.end() > here.end()) break;
      ++next;
    }
    const std::uint32_t crc = crc32c(block);
    sums.block_crcs.push_back(crc);
    sums.crc = crc32c_combine(sums.crc, crc, here.length);
    if (whole_part) {
      std::uint32_t& of_part = sums.part_crcs[static_cast<std::size_t>(*whole_part)];
      of_part = crc32c_combine(of_part, crc, here.length);
    }
  }
}

PieceSums PieceWriter::write(SystemCalls& calls, const std::filesystem::path& folder) const {
  PieceSums sums;
  sums.part_crcs.resize(parts_);
  sums.block_crcs.reserve(static_cast<std::size_t>(detail::crc_blocks(piece_.bytes)));

  File file(calls, folder / piece_.file, Access::write_direct);
  const std::int64_t padded = round_up(piece_.bytes, direct_alignment);
  sums.direct = file.direct();
  file.reserve(padded);

  const std::int64_t size = std::min(detail::request_bytes, padded);
  // Some buffers are written while another is filled.
  const detail::FileBuffer memory =
      detail::make_file_buffer(std::min(detail::request_memory, padded));
  detail::IoThreads threads;
  detail::Requests writes;
  std::size_t next = 0;
  std::size_t turn = 0;
  const auto go_on = [&turn] { turn = (turn + 1) % detail::request_count; };
  for (std::int64_t offset = 0; offset < piece_.bytes; offset += size, go_on()) {
    writes.finish(turn);
    const std::int64_t bytes = std::min(size, piece_.bytes - offset);
    const std::int64_t written = file.direct() ? round_up(bytes, direct_alignment) : bytes;
    const std::span<std::byte> chunk(memory.get() + static_cast<std::int64_t>(turn) * size,
                                     static_cast<std::size_t>(written));
    fill(chunk.first(static_cast<std::size_t>(bytes)), offset, next, sums);
    std::fill(chunk.begin() + bytes, chunk.end(), std::byte{0});
    const auto write = [&file, chunk, offset] { file.write(chunk, offset); };
    if (padded <= size) {
      write();
    } else {
      writes.begin(turn, threads, std::packaged_task<void()>(write));
    }
  }
  for (std::size_t i = 0; i < detail::request_count; ++i, go_on()) writes.finish(turn);
  file.resize(piece_.bytes);
  file.sync();
  file.close();
  return sums;
}

std::vector<std::uint32_t> combine_digests(const StoredState& state, int parts,
                                           std::span<const PieceSums> sums) {
  std::vector<std::size_t> first;  // of each buffer in the table
  std::size_t count = 0;
  for (const StoredBuffer& buffer : state.buffers) {
    first.push_back(count);
    count += buffer.arrays.size() * buffer.segments.size();
  }
  std::vector<std::uint32_t> digests(count);
  // Pieces, and the parts within, come in the order of the elements.
  for (int i = 0; i < static_cast<int>(sums.size()); ++i) {
    std::size_t next = 0;
    const std::vector<std::uint32_t>& crcs = sums[static_cast<std::size_t>(i)].part_crcs;
    for (const detail::PieceDataset& dataset :
         detail::piece_contents(state, detail::piece_id(i, parts), parts)) {
      for (const detail::Run& run : dataset.runs) {
        const StoredBuffer& buffer = state.buffer(run.buffer);
        for (const detail::TensorPart& part : detail::tensor_parts(buffer, run.range)) {
          if (next == crcs.size()) {
            raise<ArgumentError>({.object = "sums of piece " + std::to_string(i),
                                  .expected = "one a tensor's part",
                                  .found = std::to_string(crcs.size())});
          }
          std::uint32_t& digest =
              digests[first[static_cast<std::size_t>(run.buffer)] +
                      static_cast<std::size_t>(run.array) * buffer.segments.size() +
                      static_cast<std::size_t>(part.segment)];
          digest =
              crc32c_combine(digest, crcs[next++], part.range.length * bytes_of(dataset.dtype));
        }
      }
    }
  }
  return digests;
}

std::uint32_t state_digest(const StoredState& state, std::span<const std::uint32_t> digests) {
  std::vector<std::string> lines;
  std::size_t next = 0;
  for (const StoredBuffer& buffer : state.buffers) {
    for (const StoredArray& array : buffer.arrays) {
      for (const StoredSegment& segment : buffer.segments) {
        const StoredTensor& tensor = state.tensor(segment.tensor);
        lines.push_back(tensor.name + ' ' + array.name + ' ' + std::string(name(array.dtype)) +
                        ' ' + std::to_string(tensor.scalars()) + ' ' + hex(digests[next++]) + '\n');
      }
    }
  }
  std::sort(lines.begin(), lines.end());
  std::uint32_t crc = 0;
  for (const std::string& line : lines) {
    crc = crc32c(std::as_bytes(std::span(line.data(), line.size())), crc);
  }
  return crc;
}

StepWriter::StepWriter(const StoredState& state, int parts, std::string save_id,
                       std::vector<detail::Piece> pieces) {
  state.validate();
  description_ = {state, std::move(save_id), parts, std::move(pieces), {}};
  description_.state.blobs.clear();
  std::vector<const std::vector<std::byte>*> blobs;
  for (const auto& [name, bytes] : state.blobs) {
    description_.blobs.emplace_back(name, std::ssize(bytes));
    blobs.push_back(&bytes);
  }
  const h5::Session session;
  manifest_ = detail::make_manifest(description_, blobs);
}

Commit StepWriter::complete(std::span<const PieceSums> sums) {
  const StoredState& state = description_.state;
  const std::vector<std::uint32_t> digests = combine_digests(state, description_.parts, sums);
  std::byte* to = manifest_.bytes.data() + manifest_.block_crcs;
  for (std::size_t i = 0; i < sums.size(); ++i) {
    const auto expected = detail::crc_blocks(description_.pieces[i].bytes);
    if (std::ssize(sums[i].block_crcs) != expected) {
      raise<ArgumentError>({.object = "sums of piece " + std::to_string(i),
                            .expected = std::to_string(expected) + " blocks",
                            .found = std::to_string(sums[i].block_crcs.size())});
    }
    const std::size_t bytes = sums[i].block_crcs.size() * sizeof(std::uint32_t);
    if (bytes != 0) std::memcpy(to, sums[i].block_crcs.data(), bytes);
    to += bytes;
  }
  if (!digests.empty()) {
    std::memcpy(manifest_.bytes.data() + manifest_.digests, digests.data(),
                digests.size() * sizeof(std::uint32_t));
  }
  Commit commit{.step = state.step,
                .id = description_.id,
                .time = now(),
                .writer = std::string("mics ") + MICS_VERSION_STRING,
                .grid = state.grid,
                .digest = state_digest(state, digests),
                .files = {}};
  commit.files.push_back(
      {std::string(detail::manifest_name), std::ssize(manifest_.bytes), crc32c(manifest_.bytes)});
  for (std::size_t i = 0; i < sums.size(); ++i) {
    commit.files.push_back(
        {description_.pieces[i].file, description_.pieces[i].bytes, sums[i].crc});
  }
  return commit;
}

}  // namespace mics::checkpoint
