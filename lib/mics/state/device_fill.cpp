// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/error.hpp>
#include <mics/state/checksum.hpp>
#include <mics/state/device_fill.hpp>

#include <Kokkos_Core.hpp>

#include <string>

namespace mics::state {
namespace {

using TeamPolicy = Kokkos::TeamPolicy<device::Space>;
using Member = TeamPolicy::member_type;

// Lanes of a block's hash, whatever the threads of the team.
constexpr int team_lanes = 256;
constexpr int team_threads = device::separate ? team_lanes : 1;

TeamPolicy teams(const Execution& exec, std::int64_t count) {
  return {exec.as<device::Space>(), static_cast<int>(count), team_threads};
}

template <class T>
struct PoisonKernel {
  T* values;
  KOKKOS_FUNCTION void operator()(std::int64_t i) const {
    values[i] = T(Kokkos::Experimental::quiet_NaN_v<float>);
  }
};

template <class From, class To>
struct ConvertKernel {
  const From* from;
  To* to;
  KOKKOS_FUNCTION void operator()(std::int64_t i) const { to[i] = static_cast<To>(from[i]); }
};

// A team clears a range.
template <class Word>
struct ClearRangesKernel {
  Word* data;
  const layout::Interval* ranges;
  KOKKOS_FUNCTION void operator()(const Member& team) const {
    const layout::Interval& range = ranges[team.league_rank()];
    for (std::int64_t i = team.team_rank(); i < range.length; i += team.team_size()) {
      data[range.offset + i] = 0;
    }
  }
};

template <class Word>
void clear_words(const Execution& exec, void* data, std::span<const layout::Interval> ranges) {
  Kokkos::parallel_for("mics::state::clear_ranges", teams(exec, std::ssize(ranges)),
                       ClearRangesKernel<Word>{static_cast<Word*>(data), ranges.data()});
}

constexpr std::uint64_t device_multiplier = 0x9E3779B97F4A7C15ULL;

KOKKOS_INLINE_FUNCTION std::uint64_t mix(std::uint64_t hash, std::uint64_t word) {
  const std::uint64_t mixed = (hash ^ word) * device_multiplier;
  return mixed ^ (mixed >> 32);
}

// A team hashes a block: each lane every so many-th word, then one lane after the other.
struct ChecksumKernel {
  const std::uint64_t* words;
  std::int64_t bytes;
  std::uint64_t* checksums;

  static constexpr std::int64_t word_bytes = sizeof(std::uint64_t);
  static constexpr std::int64_t block_words = checksum_block_bytes / word_bytes;

  KOKKOS_FUNCTION void operator()(const Member& team) const {
    auto* const hashes = static_cast<std::uint64_t*>(
        team.team_scratch(0).get_shmem(static_cast<std::size_t>(team_lanes * word_bytes)));
    const std::int64_t begin = team.league_rank() * block_words;
    const std::int64_t all = bytes / word_bytes;
    const std::int64_t end = begin + block_words < all ? begin + block_words : all;
    for (int lane = team.team_rank(); lane < team_lanes; lane += team.team_size()) {
      std::uint64_t hash = static_cast<std::uint64_t>(lane);
      for (std::int64_t i = begin + lane; i < end; i += team_lanes) hash = mix(hash, words[i]);
      hashes[lane] = hash;
    }
    team.team_barrier();
    if (team.team_rank() != 0) return;
    std::uint64_t hash = device_multiplier;
    for (int lane = 0; lane < team_lanes; ++lane)
      hash = mix(hash, hashes[lane]) + device_multiplier;
    // Bytes behind the last whole word.
    if (begin + block_words > all) {
      const auto* const rest = reinterpret_cast<const unsigned char*>(words + all);
      for (std::int64_t i = 0; i < bytes % word_bytes; ++i)
        hash = mix(hash, rest[i]) + device_multiplier;
    }
    checksums[team.league_rank()] = hash;
  }
};

std::int64_t checksum_blocks(std::int64_t bytes) {
  return (bytes + checksum_block_bytes - 1) / checksum_block_bytes;
}

}  // namespace

void poison(const Execution& exec, void* data, DType dtype, std::int64_t count) {
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Policy = Kokkos::RangePolicy<device::Space, Kokkos::IndexType<std::int64_t>>;
    Kokkos::parallel_for("mics::state::poison", Policy(exec.as<device::Space>(), 0, count),
                         PoisonKernel<T>{static_cast<T*>(data)});
  });
}

void clear_ranges(const Execution& exec, void* data, std::int64_t element,
                  std::span<const layout::Interval> ranges) {
  if (ranges.empty()) return;
  switch (element) {
    case 2:
      return clear_words<std::uint16_t>(exec, data, ranges);
    case 4:
      return clear_words<std::uint32_t>(exec, data, ranges);
    case 8:
      return clear_words<std::uint64_t>(exec, data, ranges);
    default:
      raise<ArgumentError>({.object = "element of ranges to be cleared",
                            .expected = "2, 4 or 8 bytes",
                            .found = std::to_string(element)});
  }
}

void enqueue_block_checksums(const Execution& exec, const void* data, std::int64_t bytes,
                             std::uint64_t* checksums) {
  if (bytes == 0) return;
  Kokkos::parallel_for(
      "mics::state::block_checksums",
      teams(exec, checksum_blocks(bytes))
          .set_scratch_size(
              0, Kokkos::PerTeam(team_lanes * static_cast<int>(ChecksumKernel::word_bytes))),
      ChecksumKernel{static_cast<const std::uint64_t*>(data), bytes, checksums});
}

std::vector<std::uint64_t> block_checksums(const Execution& exec, const void* data,
                                           std::int64_t bytes) {
  std::vector<std::uint64_t> result(static_cast<std::size_t>(checksum_blocks(bytes)));
  if (result.empty()) return result;
  const Kokkos::View<std::uint64_t*, device::MemorySpace> checksums(
      Kokkos::view_alloc(Kokkos::WithoutInitializing, "mics::state::block_checksums"),
      result.size());
  enqueue_block_checksums(exec, data, bytes, checksums.data());
  device::copy(exec, result.data(), checksums.data(),
               std::ssize(result) * static_cast<std::int64_t>(sizeof(std::uint64_t)));
  exec.fence("mics::state::block_checksums: they are copied");
  return result;
}

void convert(const Execution& exec, const void* from, DType from_type, void* to, DType to_type,
             std::int64_t count) {
  visit_arithmetic(from_type, [&](auto from_tag) {
    using From = typename decltype(from_tag)::type;
    visit(to_type, [&](auto to_tag) {
      using To = typename decltype(to_tag)::type;
      using Policy = Kokkos::RangePolicy<device::Space, Kokkos::IndexType<std::int64_t>>;
      Kokkos::parallel_for(
          "mics::state::convert", Policy(exec.as<device::Space>(), 0, count),
          ConvertKernel<From, To>{static_cast<const From*>(from), static_cast<To*>(to)});
    });
  });
}

}  // namespace mics::state
