// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/packing.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/loader.hpp>
#include <mics/checkpoint/writer.hpp>
#include <mics/comm/agreement.hpp>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace mics::checkpoint {
namespace {

using layout::Interval;

// The stages of a load as messages name them.
constexpr const char* listing = "the steps of a directory";
constexpr const char* opening = "the contents of a checkpoint";
constexpr const char* reading = "the bytes of a checkpoint";
constexpr const char* comparing = "the digests of a checkpoint";

// Replica `part`'s part of what all replicas need.
Interval share_of(const Interval& range, int part, int parts) {
  constexpr std::int64_t unit = 256;
  const std::int64_t units = (range.length + unit - 1) / unit;
  const auto cut = [&](std::int64_t i) {
    return std::min(range.length, unit * (units * i / parts));
  };
  return {range.offset + cut(part), cut(part + 1) - cut(part)};
}

// What this rank would report of its piece if it saved `targets`, and only those.
PieceSums sums_of(const StoredState& state, detail::PieceId id, int parts,
                  std::span<const Target> targets) {
  PieceSums sums;
  for (const detail::PieceDataset& dataset : detail::piece_contents(state, id, parts)) {
    const std::int64_t width = bytes_of(dataset.dtype);
    for (const detail::Run& run : dataset.runs) {
      const auto memory = std::find_if(targets.begin(), targets.end(), [&](const Target& to) {
        return to.buffer == run.buffer && to.array == run.array &&
               intersection(to.range, run.range) == run.range;
      });
      for (const detail::TensorPart& part :
           detail::tensor_parts(state.buffer(run.buffer), run.range)) {
        if (memory == targets.end()) {  // not asked for
          sums.part_crcs.push_back(0);
          continue;
        }
        const std::byte* const begin =
            memory->data + (part.range.offset - memory->range.offset) * width;
        sums.part_crcs.push_back(
            crc32c({begin, static_cast<std::size_t>(part.range.length * width)}));
      }
    }
  }
  return sums;
}

// Compares the digests of what was loaded with those of what was saved. Collective over `group`.
void require_same_digests(comm::MpiTransport& group, const Checkpoint& checkpoint,
                          const StoredState& target, const layout::Place& place,
                          std::span<const Target> targets) {
  // Every rank has its part of the shard, slices or not.
  const int parts = target.grid.replicas();
  detail::Packer report;
  comm::agree(group, comparing, [&] {
    const detail::PieceId id{place.shard, place.group};
    report.put(detail::piece_index(id, parts));
    report.put(sums_of(target, id, parts, targets).part_crcs);
  });
  const auto reports = group.gather(report.bytes(), 0, {comm::Purpose::agreement, comparing, 0});
  comm::agree(group, comparing, [&] {
    if (group.rank() != 0) return;
    std::vector<PieceSums> sums(reports.size());
    for (const std::vector<std::byte>& bytes : reports) {
      detail::Unpacker from(bytes);
      const int index = from.get<int>();
      from.get(sums.at(static_cast<std::size_t>(index)).part_crcs);
    }
    const std::vector<std::uint32_t> digests = combine_digests(target, parts, sums);
    std::size_t next = 0;
    for (std::size_t b = 0; b < target.buffers.size(); ++b) {
      const StoredBuffer& buffer = target.buffers[b];
      for (std::size_t a = 0; a < buffer.arrays.size(); ++a) {
        const bool wanted = std::any_of(targets.begin(), targets.end(), [&](const Target& to) {
          return to.buffer == static_cast<int>(b) && to.array == static_cast<int>(a);
        });
        for (const StoredSegment& segment : buffer.segments) {
          const std::uint32_t found = digests[next++];
          if (!wanted) continue;
          const std::string& name = target.tensor(segment.tensor).name;
          const auto expected =
              checkpoint.digest_of(checkpoint.find_tensor(name), buffer.arrays[a]);
          if (!expected || *expected == found) continue;
          raise<FormatError>({.object = buffer.arrays[a].name + " of parameter " + in_quotes(name) +
                                        " loaded from " + in_quotes(checkpoint.folder().string()),
                              .expected = "digest " + hex(*expected),
                              .found = hex(found)});
        }
      }
    }
  });
}

}  // namespace

std::optional<Checkpoint> load(comm::MpiTransport& group, const std::filesystem::path& directory,
                               const StoredState& target, const layout::Place& place,
                               std::span<const Target> targets, const Broadcast& broadcast,
                               std::optional<std::int64_t> step, const LogSink& log,
                               SystemCalls& calls) {
  std::vector<std::int64_t> steps;
  if (step) {
    steps = {*step};
  } else {
    std::vector<std::byte> found;
    comm::agree_patiently(group, listing, [&] {
      if (group.rank() != 0) return;
      const auto here = std::as_bytes(std::span(steps = list_steps(directory)));
      found.assign(here.begin(), here.end());
    });
    comm::broadcast(group, found, 0, listing);
    steps.resize(found.size() / sizeof(std::int64_t));
    if (!found.empty()) std::memcpy(steps.data(), found.data(), found.size());
  }

  const int replicas = target.grid.replicas();
  // A slice belongs to one replica alone.
  const auto is_shared = [&](const Target& to) {
    return broadcast && replicas > 1 && to.range == target.shard(to.buffer, place.shard);
  };
  const auto pass_over = [&](std::int64_t damaged, const Error& error) {
    if (!log || group.rank() != 0) return;
    log(LogLevel::warning, std::string(error.what()) + "; step " + std::to_string(damaged) +
                               " is passed over for an older one");
  };
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const std::filesystem::path folder = directory / step_name(steps[i]);
    const bool last = i + 1 == steps.size();
    std::optional<Checkpoint> checkpoint;
    try {
      std::vector<std::byte> bytes;
      comm::agree_patiently(group, opening, [&] {
        if (group.rank() == 0) bytes = Checkpoint::fetch(calls, folder);
      });
      comm::broadcast(group, bytes, 0, opening);
      comm::agree(group, opening,
                  [&] { checkpoint.emplace(Checkpoint::receive(calls, folder, bytes)); });
    } catch (const CommError&) {
      throw;
    } catch (const Error& error) {
      if (last) throw;
      pass_over(steps[i], error);
      continue;
    }
    // A model that is another is no damage, which an older step could mend.
    comm::agree(group, opening, [&] { checkpoint->require_same_tensors(target); });
    try {
      comm::agree_patiently(group, reading, [&] {
        std::vector<Target> own;
        for (Target to : targets) {
          if (is_shared(to)) {
            const Interval whole = to.range;
            to.range = share_of(whole, place.group, replicas);
            const DType dtype =
                target.buffer(to.buffer).arrays[static_cast<std::size_t>(to.array)].dtype;
            to.data += (to.range.offset - whole.offset) * bytes_of(dtype);
          }
          own.push_back(to);
        }
        checkpoint->read(target, own);
      });
    } catch (const CommError&) {
      throw;
    } catch (const Error& error) {
      if (last) throw;
      pass_over(steps[i], error);
      continue;
    }
    for (const Target& to : targets) {
      if (!is_shared(to)) continue;
      const std::int64_t width =
          bytes_of(target.buffer(to.buffer).arrays[static_cast<std::size_t>(to.array)].dtype);
      for (int replica = 0; replica < replicas; ++replica) {
        const Interval part = share_of(to.range, replica, replicas);
        if (part.empty()) continue;
        broadcast(to.data + (part.offset - to.range.offset) * width, part.length * width, replica);
      }
    }
    require_same_digests(group, *checkpoint, target, place, targets);
    return checkpoint;
  }
  return {};
}

}  // namespace mics::checkpoint
