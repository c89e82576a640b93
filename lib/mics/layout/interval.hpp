// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>

namespace mics::layout {

/// Half-open range of elements [offset, offset + length).
struct Interval {
  std::int64_t offset = 0;
  std::int64_t length = 0;

  [[nodiscard]] constexpr std::int64_t end() const { return offset + length; }
  [[nodiscard]] constexpr bool empty() const { return length == 0; }
  friend constexpr bool operator==(const Interval&, const Interval&) = default;
};

/// The elements that both hold; length 0 if none.
[[nodiscard]] constexpr Interval intersection(const Interval& a, const Interval& b) {
  const std::int64_t begin = std::max(a.offset, b.offset);
  const std::int64_t end = std::min(a.end(), b.end());
  return {begin, std::max<std::int64_t>(0, end - begin)};
}

/// Smallest multiple of `multiple` that is at least `value`.
[[nodiscard]] constexpr std::int64_t round_up(std::int64_t value, std::int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

}  // namespace mics::layout
