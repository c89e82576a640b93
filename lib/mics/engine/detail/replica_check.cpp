// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/hash.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/state/checksum.hpp>
#include <mics/state/device_fill.hpp>

#include <algorithm>
#include <map>

// What replicas hold in common is compared by its bits, found where it differs, and repaired.

namespace mics::detail {

using comm::Operation;
using comm::Purpose;

namespace {

// The replica whose value most replicas have, the lowest of those in case of a draw.
int majority(std::span<const std::uint64_t> values) {
  std::map<std::uint64_t, int> votes;
  for (const std::uint64_t value : values) ++votes[value];
  int best = 0;
  for (std::size_t r = 1; r < values.size(); ++r) {
    if (votes[values[r]] > votes[values[static_cast<std::size_t>(best)]])
      best = static_cast<int>(r);
  }
  return best;
}

}  // namespace

std::vector<EngineState::Replicated> EngineState::replicated() const {
  std::vector<Replicated> arrays;
  for (int b = 0; b < plan_.flat().buffer_count(); ++b) {
    if (flat(b).flat.count() == 0) continue;
    const auto add = [&](const std::string& array) {
      DType dtype = DType::fp32;
      std::byte* data = array_of(b, array, dtype);
      arrays.push_back({b, array, data, flat(b).flat.shard_count() * bytes_of(dtype)});
    };
    add("compute");
    if (!flat(b).trainable) continue;
    if (!plan_.master_is_compute(b)) add("master_weights");
    for (const optim::StateSpec& spec : state_specs_) add(spec.name);
  }
  return arrays;
}

std::vector<std::uint64_t> EngineState::block_checksums_of(const Replicated& array) const {
  if (!on_device()) return state::block_checksums(array.data, array.bytes);
  return state::block_checksums(exec_, array.data, array.bytes);
}

bool EngineState::check_replicas() {
  if (plan_.layout().replicas() == 1) return false;
  comm::Transport& replica = groups_.replica();
  const std::vector<Replicated> arrays = replicated();
  std::vector<std::uint64_t> checksums;
  std::uint64_t mine = 0;
  for (const Replicated& array : arrays) {
    checksums.push_back(state::combine_checksums(block_checksums_of(array)));
    mine = hash_combine(mine, checksums.back());
  }
  const Operation operation{Purpose::agreement, "checksum of replicas", sizeof(mine)};
  operations_.record(operation);
  std::vector<std::uint64_t> all(static_cast<std::size_t>(replica.size()));
  replica.all_gather_small(&mine, all.data(), sizeof(mine), operation);
  const bool same =
      std::all_of(all.begin(), all.end(), [=](std::uint64_t theirs) { return theirs == mine; });
  if (!same) repair_or_fail(arrays, checksums);
  if (!sharded()) return !same;
  // A shard group gathers anew if one of its ranks was repaired.
  const Operation verdict{Purpose::agreement, "repair of replicas", 1};
  operations_.record(verdict);
  const std::byte here{same ? std::uint8_t{0} : std::uint8_t{1}};
  std::vector<std::byte> repaired(static_cast<std::size_t>(groups_.shard().size()));
  groups_.shard().all_gather_small(&here, repaired.data(), 1, verdict);
  return std::any_of(repaired.begin(), repaired.end(),
                     [](std::byte rank) { return rank != std::byte{0}; });
}

void EngineState::repair_or_fail(const std::vector<Replicated>& arrays,
                                 const std::vector<std::uint64_t>& checksums) {
  comm::Transport& replica = groups_.replica();
  const auto size = static_cast<std::size_t>(replica.size());
  const auto bytes = static_cast<std::int64_t>(checksums.size() * sizeof(std::uint64_t));
  std::vector<std::uint64_t> all(checksums.size() * size);
  replica.all_gather_small(checksums.data(), all.data(), bytes,
                           {Purpose::agreement, "checksums of replicas' arrays", bytes});
  for (std::size_t i = 0; i < arrays.size(); ++i) {
    std::vector<std::uint64_t> of_array(size);
    for (std::size_t r = 0; r < size; ++r) of_array[r] = all[r * checksums.size() + i];
    const int reference = majority(of_array);
    const auto agrees = [&](std::size_t r) {
      return of_array[r] == of_array[static_cast<std::size_t>(reference)];
    };
    std::size_t other = 0;
    while (other < size && agrees(other)) ++other;
    if (other == size) continue;

    // The first block in which the lowest such replica differs.
    const Replicated& array = arrays[i];
    const std::vector<std::uint64_t> blocks = block_checksums_of(array);
    std::vector<std::uint64_t> all_blocks(blocks.size() * size);
    const auto block_bytes = static_cast<std::int64_t>(blocks.size() * sizeof(std::uint64_t));
    replica.all_gather_small(blocks.data(), all_blocks.data(), block_bytes,
                             {Purpose::agreement, "checksums of replicas' blocks", block_bytes});
    const auto block_of = [&](std::size_t r, std::size_t k) {
      return all_blocks[r * blocks.size() + k];
    };
    std::size_t block = 0;
    while (block + 1 < blocks.size() &&
           block_of(other, block) == block_of(static_cast<std::size_t>(reference), block)) {
      ++block;
    }
    const layout::GroupLayout& layout = plan_.layout();
    const int tau = layout.place(world_.rank()).shard;
    const auto begin = static_cast<std::int64_t>(block) * state::checksum_block_bytes;
    const ErrorText text{
        .object = array.array + " of unit " + in_quotes(flat(array.buffer).name) + ", shard " +
                  std::to_string(tau) + ", after step " + std::to_string(steps_),
        .expected = "the same bits on all " + std::to_string(size) + " replicas",
        .found = "others on replica " + std::to_string(other) + " (rank " +
                 std::to_string(layout.rank_of(static_cast<int>(other), tau)) +
                 ") than on replica " + std::to_string(reference) + " (rank " +
                 std::to_string(layout.rank_of(reference, tau)) + "), first in bytes " +
                 std::to_string(begin) + " to " +
                 std::to_string(std::min(array.bytes, begin + state::checksum_block_bytes)) +
                 " of " + std::to_string(array.bytes),
        .remedy = config_.replica_action == ReplicaCheck::repair
                      ? "repaired from replica " + std::to_string(reference)
                      : "check that rank's memory, or set \"replica_check_action\" to \"repair\""};
    const std::string line = format_error(text, std::source_location::current());
    if (config_.replica_action == ReplicaCheck::abort) {
      failures_.fail(line);
      failures_.poll();
    }
    if (!agrees(static_cast<std::size_t>(replica.rank()))) warn(line);
    const Operation repair{Purpose::agreement, "repair of a replica", array.bytes};
    if (on_device()) {
      std::vector<std::byte> bits(static_cast<std::size_t>(array.bytes));
      copy_out(bits.data(), array.data, array.bytes);
      replica.broadcast(bits.data(), array.bytes, reference, repair);
      copy_in(array.data, bits.data(), array.bytes);
    } else {
      replica.broadcast(array.data, array.bytes, reference, repair);
    }
  }
}

}  // namespace mics::detail
