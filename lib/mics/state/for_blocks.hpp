// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/base/host_blocks.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>

namespace mics::state {

/// Elements that one thread works on at a time: small enough to balance, large enough that a block
/// is a stream of vector instructions. Fixed, so that results do not depend on the thread count.
inline constexpr std::int64_t block_count = 4096;

/// Number of blocks of `count` elements.
[[nodiscard]] constexpr std::int64_t blocks_of(std::int64_t count) {
  return (count + block_count - 1) / block_count;
}

/// Calls `body(begin, end)` for the blocks of [0, count), in parallel on the host; blocks until all
/// are done.
template <class Body>
void for_blocks(const std::string& label, std::int64_t count, const Body& body) {
  for_host_blocks(label, count, block_count, body);
}

/// Sets `bytes` bytes of host memory to zero.
inline void clear(const std::string& label, void* data, std::int64_t bytes) {
  // Blocks of 1 MiB: memset switches to streaming stores for long ranges.
  constexpr std::int64_t grain = (std::int64_t{1} << 20) / block_count;
  for_blocks(label, (bytes + grain - 1) / grain, [=](std::int64_t begin, std::int64_t end) {
    const std::int64_t first = begin * grain;
    std::memset(static_cast<std::byte*>(data) + first, 0,
                static_cast<std::size_t>(std::min(bytes, end * grain) - first));
  });
}

/// Sets `count` elements of host memory to NaN, so that an element which should not be used shows.
inline void poison(void* data, DType dtype, std::int64_t count) {
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    T* const values = static_cast<T*>(data);
    for_blocks("mics::state::poison", count, [=](std::int64_t begin, std::int64_t end) {
      std::fill(values + begin, values + end, T(std::numeric_limits<float>::quiet_NaN()));
    });
  });
}

}  // namespace mics::state
