// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/gather.hpp>
#include <mics/checkpoint/detail/packing.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/loader.hpp>
#include <mics/checkpoint/writer.hpp>
#include <mics/comm/agreement.hpp>

#include <algorithm>
#include <string>
#include <vector>

namespace mics::checkpoint {
namespace {

using layout::Interval;

// Replica `part`'s part of what all replicas need.
Interval share_of(const Interval& range, int part, int parts) {
  constexpr std::int64_t unit = 256;
  const std::int64_t units = (range.length + unit - 1) / unit;
  const auto cut = [&](std::int64_t i) {
    return std::min(range.length, unit * (units * i / parts));
  };
  return {range.offset + cut(part), cut(part + 1) - cut(part)};
}

// Bytes of any number from rank 0. Collective over `world`.
void broadcast_bytes(const comm::Communicator& world, std::vector<std::byte>& bytes) {
  auto count = static_cast<std::int64_t>(bytes.size());
  comm::check(MPI_Bcast(&count, 1, MPI_INT64_T, 0, world.native()), "contents of a checkpoint");
  bytes.resize(static_cast<std::size_t>(count));
  constexpr std::int64_t most = std::int64_t{1} << 30;
  for (std::int64_t done = 0; done < count; done += most) {
    comm::check(MPI_Bcast(bytes.data() + done, static_cast<int>(std::min(most, count - done)),
                          MPI_BYTE, 0, world.native()),
                "contents of a checkpoint");
  }
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

// Compares the digests of what was loaded with those of what was saved. Collective over `world`.
void require_same_digests(const comm::Communicator& world, const Checkpoint& checkpoint,
                          const StoredState& target, const layout::Place& place,
                          std::span<const Target> targets) {
  // Every rank has its part of the shard, slices or not.
  const int parts = target.grid.replicas();
  detail::Packer report;
  comm::agree(world, [&] {
    const detail::PieceId id{place.shard, place.group};
    report.put(detail::piece_index(id, parts));
    report.put(sums_of(target, id, parts, targets).part_crcs);
  });
  const auto reports = detail::gather(world, report.bytes());
  comm::agree(world, [&] {
    if (world.rank() != 0) return;
    std::vector<PieceSums> sums(reports.size());
    for (const std::vector<std::byte>& bytes : reports) {
      detail::Unpacker from(bytes);
      const int index = from.get<int>();
      from.get(sums.at(static_cast<std::size_t>(index)).part_crcs);
    }
    const std::vector<std::uint32_t> digests = combine_digests(target, parts, sums);
    checkpoint.require_same_digests(target, digests, [&](int buffer, int array) {
      return std::any_of(targets.begin(), targets.end(), [&](const Target& to) {
        return to.buffer == buffer && to.array == array;
      });
    });
  });
}

}  // namespace

std::optional<Checkpoint> load(const comm::Communicator& world,
                               const std::filesystem::path& directory, const StoredState& target,
                               const layout::Place& place, std::span<const Target> targets,
                               const Broadcast& broadcast, std::optional<std::int64_t> step,
                               const LogSink& log, SystemCalls& calls) {
  std::vector<std::int64_t> steps;
  comm::agree(world, [&] {
    if (step) {
      steps = {*step};
    } else if (world.rank() == 0) {
      steps = list_steps(directory);
      std::error_code ignored;
      if (steps.empty() && std::filesystem::exists(directory / commit_name, ignored)) {
        raise<FormatError>({.object = in_quotes(directory.string()),
                            .expected = "a directory of steps",
                            .found = "one step",
                            .remedy = "name the directory that it is in"});
      }
    }
  });
  auto count = static_cast<std::int64_t>(steps.size());
  comm::check(MPI_Bcast(&count, 1, MPI_INT64_T, 0, world.native()), "steps of a directory");
  steps.resize(static_cast<std::size_t>(count));
  comm::check(MPI_Bcast(steps.data(), static_cast<int>(count), MPI_INT64_T, 0, world.native()),
              "steps of a directory");

  const int replicas = target.grid.replicas();
  // A slice belongs to one replica alone.
  const auto is_shared = [&](const Target& to) {
    return broadcast && replicas > 1 && to.range == target.shard(to.buffer, place.shard);
  };
  const auto pass_over = [&](std::int64_t damaged, const Error& error) {
    if (!log || world.rank() != 0) return;
    log(LogLevel::warning, std::string(error.what()) + "; step " + std::to_string(damaged) +
                               " is passed over for an older one");
  };
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const std::filesystem::path folder = directory / step_name(steps[i]);
    const bool last = i + 1 == steps.size();
    std::optional<Checkpoint> checkpoint;
    try {
      std::vector<std::byte> packed;
      comm::agree(world, [&] {
        if (world.rank() != 0) return;
        checkpoint.emplace(Checkpoint::open(calls, folder));
        packed = checkpoint->packed();
      });
      broadcast_bytes(world, packed);
      comm::agree(world, [&] {
        if (world.rank() != 0) checkpoint.emplace(Checkpoint::receive(calls, folder, packed));
      });
    } catch (const CommError&) {
      throw;
    } catch (const Error& error) {
      if (last) throw;
      pass_over(steps[i], error);
      continue;
    }
    // A model that is another is no damage, which an older step could mend.
    comm::agree(world, [&] { checkpoint->require_same_tensors(target); });
    try {
      comm::agree(world, [&] {
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
    require_same_digests(world, *checkpoint, target, place, targets);
    return checkpoint;
  }
  return {};
}

}  // namespace mics::checkpoint
