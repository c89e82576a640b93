// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/comm/transport.hpp>

#include <cstdint>
#include <span>

namespace mics::comm::detail {

/// result[i] (=|+=) sources[0][i] + sources[1][i] + ..., in that order, in the arithmetic of
/// `result_type`. Host memory; local; blocks. Floor: (sources + 1 or 2) passes over memory.
void sum_in_order(std::span<const void* const> sources, DType wire, void* result, DType result_type,
                  std::int64_t count, SumMode mode);

}  // namespace mics::comm::detail
