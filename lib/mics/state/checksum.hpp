// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace mics::state {

/// Bytes that one entry of block_checksums() covers.
inline constexpr std::int64_t checksum_block_bytes = std::int64_t{1} << 20;

/// A 64-bit hash of every block of host memory, the last one perhaps shorter, by its bits: tells
/// -0 from 0 and one NaN from another. The same on every machine of one byte order; not for stored
/// data. Local; blocks. Floor: one read of the bytes.
[[nodiscard]] std::vector<std::uint64_t> block_checksums(const void* data, std::int64_t bytes);

/// One number for all blocks, in their order.
[[nodiscard]] std::uint64_t combine_checksums(std::span<const std::uint64_t> blocks);
/// combine_checksums of block_checksums.
[[nodiscard]] std::uint64_t checksum(const void* data, std::int64_t bytes);

}  // namespace mics::state
