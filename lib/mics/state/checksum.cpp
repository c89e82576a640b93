// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/state/checksum.hpp>
#include <mics/state/for_blocks.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>

namespace mics::state {
namespace {

constexpr std::size_t lanes = 8;
constexpr std::uint64_t multiplier = 0x9E3779B97F4A7C15ULL;

// Several running hashes that do not wait for each other's multiplication.
std::uint64_t hash_block(const std::byte* data, std::int64_t bytes) {
  std::array<std::uint64_t, lanes> hashes{};
  constexpr auto stride = static_cast<std::int64_t>(lanes * sizeof(std::uint64_t));
  std::int64_t done = 0;
  for (; done + stride <= bytes; done += stride) {
    std::array<std::uint64_t, lanes> words;
    std::memcpy(words.data(), data + done, sizeof(words));
    for (std::size_t j = 0; j < lanes; ++j) {
      const std::uint64_t mixed = (hashes[j] ^ words[j]) * multiplier;
      hashes[j] = mixed ^ (mixed >> 32);
    }
  }
  std::uint64_t hash = static_cast<std::uint64_t>(bytes);
  for (const std::uint64_t h : hashes) hash = hash_combine(hash, h);
  for (; done < bytes; ++done) {
    hash = hash_combine(hash, std::to_integer<std::uint64_t>(data[done]));
  }
  return hash;
}

}  // namespace

std::vector<std::uint64_t> block_checksums(const void* data, std::int64_t bytes) {
  const std::int64_t count = (bytes + checksum_block_bytes - 1) / checksum_block_bytes;
  std::vector<std::uint64_t> checksums(static_cast<std::size_t>(count));
  std::uint64_t* const out = checksums.data();
  const auto* const from = static_cast<const std::byte*>(data);
  const auto one = [=](std::int64_t block) {
    const std::int64_t begin = block * checksum_block_bytes;
    out[block] = hash_block(from + begin, std::min(checksum_block_bytes, bytes - begin));
  };
  using Host = Kokkos::DefaultHostExecutionSpace;
  if (count > 1 && Host().concurrency() > 1) {
    Kokkos::parallel_for("mics::state::block_checksums", Kokkos::RangePolicy<Host>(0, count), one);
    Host().fence("mics::state::block_checksums: blocks are complete");
  } else {
    for (std::int64_t block = 0; block < count; ++block) one(block);
  }
  return checksums;
}

std::uint64_t combine_checksums(std::span<const std::uint64_t> blocks) {
  std::uint64_t hash = 0;
  for (const std::uint64_t block : blocks) hash = hash_combine(hash, block);
  return hash;
}

std::uint64_t checksum(const void* data, std::int64_t bytes) {
  return combine_checksums(block_checksums(data, bytes));
}

}  // namespace mics::state
