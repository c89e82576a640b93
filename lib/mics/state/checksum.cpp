// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/base/host_blocks.hpp>
#include <mics/state/checksum.hpp>

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
  for_host_blocks("mics::state::block_checksums", bytes, checksum_block_bytes,
                  [=](std::int64_t begin, std::int64_t end) {
                    out[begin / checksum_block_bytes] = hash_block(from + begin, end - begin);
                  });
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
