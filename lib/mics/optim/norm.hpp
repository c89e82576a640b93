// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>

#include <cstdint>
#include <span>

namespace mics::optim {

/// Sum of the squares of `count` elements in fp64: fixed blocks, added in order, so that the bits
/// do not depend on the number of threads. Finite exactly if every element is finite and no square
/// overflows fp64. Host memory; local; blocks. Floor: one read of the elements.
/// \param partials  at least state::blocks_of(count) elements, overwritten
[[nodiscard]] double sum_of_squares(const void* values, DType dtype, std::int64_t count,
                                    std::span<double> partials);

}  // namespace mics::optim
