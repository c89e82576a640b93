// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <numbers>

namespace mics {

/// Philox4x32-10: 128 random bits that depend only on (key, counter), so that any rank can draw any
/// element of any stream without having drawn the ones before.
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
[[nodiscard]] constexpr std::array<std::uint32_t, 4> philox(std::array<std::uint32_t, 4> counter,
                                                            std::array<std::uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = 0xD2511F53ULL * counter[0];
    const std::uint64_t b = 0xCD9E8D57ULL * counter[2];
    counter = {
        static_cast<std::uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(b),
        static_cast<std::uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(a)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

/// A stream of random numbers addressed by element index.
struct RandomStream {
  std::uint64_t seed = 0;
  std::uint64_t stream = 0;  ///< a parameter, a data set, a purpose

  /// 128 bits for element `index`.
  [[nodiscard]] constexpr std::array<std::uint32_t, 4> bits(std::uint64_t index) const {
    return philox({static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32),
                   static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)},
                  {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  }
  /// Uniform in [0, 1) with 53 bits.
  [[nodiscard]] constexpr double uniform(std::uint64_t index) const {
    const auto word = bits(index);
    const std::uint64_t mantissa = (static_cast<std::uint64_t>(word[0]) << 21) ^ (word[1] >> 11);
    return static_cast<double>(mantissa & ((1ULL << 53) - 1)) * 0x1p-53;
  }
  /// Standard normal (Box-Muller, one of the pair, so that every element stands alone).
  [[nodiscard]] double normal(std::uint64_t index) const {
    const auto word = bits(index);
    const double u = (static_cast<double>(word[0]) + 0.5) * 0x1p-32;
    const double v =
        (static_cast<double>(word[1]) + static_cast<double>(word[2]) * 0x1p-32) * 0x1p-32;
    return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
  }
};

}  // namespace mics
