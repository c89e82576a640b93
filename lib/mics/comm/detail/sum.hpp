// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/comm/transport.hpp>

#include <cstdint>
#include <span>

namespace mics::comm::detail {

/// result[i] (=|+=) factor * sources[0][i] + factor * sources[1][i] + ..., in that order, in fp64
/// if either dtype is fp64, else in fp32, rounded once to `result_type`. Host memory; local;
/// blocks. Floor: (sources + 1 or 2) passes over memory.
void sum_in_order(std::span<const void* const> sources, DType source_type, double factor,
                  void* result, DType result_type, std::int64_t count, SumMode mode);

/// to[i] = from[i] * factor, in fp64 if either dtype is fp64, else in fp32, rounded once. Host
/// memory; local; blocks. Floor: one read and one write.
void convert(const void* from, DType from_type, double factor, void* to, DType to_type,
             std::int64_t count);

}  // namespace mics::comm::detail
