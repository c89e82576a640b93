// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Macros.hpp>

#include <cstdint>

namespace mics::optim::detail {

/// Sum of squares in fp64 of consecutive elements. Sixteen running sums: a fixed order of additions
/// that vector units can follow, and enough of them that none waits for the one before.
template <class T>
[[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION double sum_of_squares(const T* value,
                                                                std::int64_t count) {
  constexpr std::int64_t width = 16;
  double sums[width] = {};
  std::int64_t i = 0;
  for (; i + width <= count; i += width) {
#if defined(__GNUC__) && !defined(__CUDA_ARCH__)
    // Elements come behind one another, and so do blocks; the processor's own guess comes later.
    constexpr std::int64_t ahead = 4096 / sizeof(T);
    __builtin_prefetch(value + i + ahead);
#endif
    for (std::int64_t j = 0; j < width; ++j) {
      const auto x = static_cast<double>(value[i + j]);
      sums[j] += x * x;
    }
  }
  for (; i < count; ++i) {
    const auto x = static_cast<double>(value[i]);
    sums[0] += x * x;
  }
  double sum = 0;
  for (const double s : sums) sum += s;
  return sum;
}

}  // namespace mics::optim::detail
