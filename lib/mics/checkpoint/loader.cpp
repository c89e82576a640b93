// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/loader.hpp>
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
      if (log && world.rank() == 0) {
        log(LogLevel::warning, std::string(error.what()) + "; step " + std::to_string(steps[i]) +
                                   " is passed over for an older one");
      }
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
      if (log && world.rank() == 0) {
        log(LogLevel::warning, std::string(error.what()) + "; step " + std::to_string(steps[i]) +
                                   " is passed over for an older one");
      }
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
    return checkpoint;
  }
  return {};
}

}  // namespace mics::checkpoint
