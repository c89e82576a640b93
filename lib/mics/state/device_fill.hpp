// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/base/execution.hpp>
#include <mics/layout/interval.hpp>

#include <cstdint>
#include <span>
#include <vector>

// What device memory is filled with and compared by. Work is enqueued in `exec`, an instance of
// device::Space; local.

namespace mics::state {

/// Sets elements of device memory to NaN, so that one which should not be used shows. Does not
/// block.
void poison(const Execution& exec, void* data, DType dtype, std::int64_t count);

/// Sets ranges of device memory to zero, all in one kernel. Does not block.
/// \param element  bytes of an element: 2, 4 or 8
/// \param ranges   in elements; the table lies in device memory and is read by the kernel
void clear_ranges(const Execution& exec, void* data, std::int64_t element,
                  std::span<const layout::Interval> ranges);

/// A 64-bit hash of every block of checksum_block_bytes of device memory, the last one perhaps
/// shorter, by its bits. Not those of the function for host memory, and not for stored data: for
/// comparison between devices. Does not block. Floor: one read of the bytes.
/// \param data       aligned to 8 bytes
/// \param checksums  device memory: one for each block
void enqueue_block_checksums(const Execution& exec, const void* data, std::int64_t bytes,
                             std::uint64_t* checksums);

/// The same, copied to the host. Allocates; blocks.
[[nodiscard]] std::vector<std::uint64_t> block_checksums(const Execution& exec, const void* data,
                                                         std::int64_t bytes);

/// to[i] = from[i], rounded to `to_type` once, for `count` elements of device memory. Ordered in
/// `exec`, an instance of device::Space; local; does not block. Floor: one read and one write.
/// \throws ArgumentError if `from_type` is no arithmetic dtype
void convert(const Execution& exec, const void* from, DType from_type, void* to, DType to_type,
             std::int64_t count);

}  // namespace mics::state
