// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/comm/transport.hpp>

#include <cstdint>

namespace mics::comm {

/// Who adds what the ranks of a group send to each other over NCCL.
enum class DeviceSums : std::uint8_t {
  wire,  ///< NCCL, in the wire dtype: partial sums are rounded to it on their way round the ring
  fp32,  ///< mics, in rank order in fp32 (fp64 as Reduction says), rounded once: the same bits as
         ///< on host memory, for up to as many bytes on the wire
};

namespace detail {

/// Elements between pieces in staging memory: every piece starts at a multiple of 16 bytes.
[[nodiscard]] constexpr std::int64_t padded_count(std::int64_t count) {
  return (count + 63) / 64 * 64;
}

/// An all-reduce cuts its data into pieces of whole granules, which the ranks sum.
inline constexpr std::int64_t all_reduce_granule = 64;

struct ElementRange {
  std::int64_t offset = 0;
  std::int64_t count = 0;
};

/// What `rank` of `size` sums of `count` elements.
[[nodiscard]] constexpr ElementRange all_reduce_piece(std::int64_t count, int rank, int size) {
  const std::int64_t granules = (count + all_reduce_granule - 1) / all_reduce_granule;
  const auto bound = [&](int i) {
    const std::int64_t at = granules * i / size * all_reduce_granule;
    return at < count ? at : count;
  };
  return {bound(rank), bound(rank + 1) - bound(rank)};
}

}  // namespace detail

/// Bytes of device memory that `NcclTransport::reduce_scatter` of `count` elements a rank needs for
/// pieces on their way. Example: 4 ranks, 1000 elements, bf16 over bf16 into fp32: 2048 (the own
/// shard, padded) with `wire`, 3 * 2048 (one piece of each other rank) with `fp32`.
[[nodiscard]] constexpr std::int64_t reduce_scatter_staging_bytes(int size, std::int64_t count,
                                                                  const Reduction& reduction,
                                                                  DeviceSums sums) {
  if (size == 1) return 0;
  const std::int64_t wire = bytes_of(reduction.wire);
  const std::int64_t whole =
      reduction.converts() ? detail::padded_count(size * count) * wire : std::int64_t{0};
  const std::int64_t piece = detail::padded_count(count) * wire;
  if (sums == DeviceSums::fp32) return whole + (size - 1) * piece;
  // NCCL sums into the result itself, or into the own place in what was converted.
  const bool direct = reduction.mode == SumMode::assign && reduction.wire == reduction.result;
  return direct || whole > 0 ? whole : piece;
}

/// The same of `NcclTransport::all_reduce` of `count` elements.
[[nodiscard]] constexpr std::int64_t all_reduce_staging_bytes(int size, std::int64_t count,
                                                              const Reduction& reduction,
                                                              DeviceSums sums) {
  if (size == 1) return 0;
  const std::int64_t wire = bytes_of(reduction.wire);
  const std::int64_t whole =
      reduction.converts() ? detail::padded_count(count) * wire : std::int64_t{0};
  if (sums == DeviceSums::wire) return whole;
  const std::int64_t granules =
      (count + detail::all_reduce_granule - 1) / detail::all_reduce_granule;
  const std::int64_t largest = (granules + size - 1) / size * detail::all_reduce_granule;
  return whole + (size - 1) * largest * wire;
}

}  // namespace mics::comm
