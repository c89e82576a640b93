// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>
#include <mics/base/dtype.hpp>
#include <mics/comm/transport.hpp>

#include <cstdint>

namespace mics::comm::detail {

/// The addends of a sum: one piece of every rank.
struct RankPieces {
  const void* own = nullptr;     ///< of rank `rank`
  const void* others = nullptr;  ///< of the other ranks, in their order
  std::int64_t stride = 0;       ///< elements between the pieces of two of them
  int rank = 0;
  int size = 1;
};

/// `sum_in_order` of all pieces in rank order, on device memory: the same bits, apart from those
/// that a NaN carries. Ordered in `exec`, an instance of device::Space; does not block. `result`
/// may be one of the pieces if the dtypes are the same. Cost: one kernel, 16 bytes an access where
/// all pieces and the result are aligned to them; floor: size + 1 or 2 passes over memory.
void sum_on_device(const Execution& exec, const RankPieces& pieces, DType source_type,
                   double factor, void* result, DType result_type, std::int64_t count,
                   SumMode mode);

/// `convert` on device memory, likewise. Floor: one read and one write.
void convert_on_device(const Execution& exec, const void* from, DType from_type, double factor,
                       void* to, DType to_type, std::int64_t count);

}  // namespace mics::comm::detail
