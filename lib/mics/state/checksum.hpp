// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace mics::state {

/// Bytes that one entry of block_checksums() covers.
inline constexpr std::int64_t checksum_block_bytes = std::int64_t{1} << 20;

/// A 64-bit hash of every block of host memory, the last one perhaps shorter, by its bits: tells
/// -0 from 0 and one NaN from another. The same on every machine of one byte order; not for stored
/// data. Local; blocks. Floor: one read of the bytes.
///
/// \param then  if not empty, called for each block [begin, end) of the bytes when it was read, by
/// the thread that read it and while the caches hold it; must not throw
[[nodiscard]] std::vector<std::uint64_t> block_checksums(
    const void* data, std::int64_t bytes,
    const std::function<void(std::int64_t begin, std::int64_t end)>& then = {});

/// One number for all blocks, in their order.
[[nodiscard]] std::uint64_t combine_checksums(std::span<const std::uint64_t> blocks);
/// combine_checksums of block_checksums.
[[nodiscard]] std::uint64_t checksum(const void* data, std::int64_t bytes);

}  // namespace mics::state
