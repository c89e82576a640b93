// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace mics::optim::detail {

/// Sum of squares in fp64 of consecutive elements. Eight running sums: a fixed order of additions
/// that vector units can follow.
template <class T>
[[nodiscard]] double sum_of_squares(const T* value, std::int64_t count) {
  constexpr std::int64_t width = 8;
  std::array<double, width> sums{};
  std::int64_t i = 0;
  for (; i + width <= count; i += width) {
    for (std::int64_t j = 0; j < width; ++j) {
      const auto x = static_cast<double>(value[i + j]);
      sums[static_cast<std::size_t>(j)] += x * x;
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
