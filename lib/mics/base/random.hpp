// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Array.hpp>
#include <Kokkos_BitManipulation.hpp>
#include <Kokkos_MathematicalFunctions.hpp>

#include <cstdint>

namespace mics {

/// Philox4x32-10: 128 random bits that depend only on (key, counter), so that any rank can draw any
/// element of any stream without having drawn the ones before.
/// Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
[[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION constexpr Kokkos::Array<std::uint32_t, 4> philox(
    Kokkos::Array<std::uint32_t, 4> counter, Kokkos::Array<std::uint32_t, 2> key) {
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

namespace detail {

// Of libraries' logarithms and cosines each CPU and device has its own bits. These are series of
// basic operations, which are rounded alike everywhere; every product that is added is an explicit
// fma, so that no compiler has a choice. Within 2e-16 of the largest value; loops over them become
// vector instructions.

/// A word as a number; before AVX-512 there is no vector instruction for it.
[[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION double number_of(std::uint32_t word) {
  return Kokkos::bit_cast<double>(0x4330000000000000ULL | word) - 0x1p52;
}

/// ln(u), u in (0, 1) and not subnormal.
[[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION double natural_log(double u) {
  constexpr std::uint64_t root_half = 0x3FE6A09E667F3BCDULL;  // bits of sqrt(1/2)
  constexpr double ln2_high = 0x1.62e42feep-1;                // times an exponent: exact
  constexpr double ln2_low = 0x1.a39ef35793c76p-33;
  const auto bits = Kokkos::bit_cast<std::uint64_t>(u);
  // u = m 2^exponent, m in [sqrt(1/2), sqrt(2)).
  const auto exponent =
      static_cast<std::int32_t>(static_cast<std::uint32_t>((bits - root_half) >> 32)) >> 20;
  const auto m = Kokkos::bit_cast<double>(
      bits - (static_cast<std::uint64_t>(static_cast<std::int64_t>(exponent)) << 52));
  // ln(m) = 2 atanh(s)
  const double s = (m - 1) / (m + 1);
  const double z = s * s;
  double series = 1.0 / 19;
  series = Kokkos::fma(series, z, 1.0 / 17);
  series = Kokkos::fma(series, z, 1.0 / 15);
  series = Kokkos::fma(series, z, 1.0 / 13);
  series = Kokkos::fma(series, z, 1.0 / 11);
  series = Kokkos::fma(series, z, 1.0 / 9);
  series = Kokkos::fma(series, z, 1.0 / 7);
  series = Kokkos::fma(series, z, 1.0 / 5);
  series = Kokkos::fma(series, z, 1.0 / 3);
  const double twice = 2 * s;
  const double log_m = Kokkos::fma(twice * z, series, twice);
  const auto e = static_cast<double>(exponent);
  return Kokkos::fma(e, ln2_high, Kokkos::fma(e, ln2_low, log_m));
}

/// cos(2 pi v), v in [0, 1).
[[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION double cosine_of_turns(double v) {
  const auto quarter = static_cast<std::int32_t>(4 * v + 0.5);
  const double x = 0x1.921fb54442d18p+2 * (v - 0.25 * quarter);  // within pi / 4; the rest is exact
  const double z = x * x;
  double sine = -1.0 / 1307674368000;
  sine = Kokkos::fma(sine, z, 1.0 / 6227020800);
  sine = Kokkos::fma(sine, z, -1.0 / 39916800);
  sine = Kokkos::fma(sine, z, 1.0 / 362880);
  sine = Kokkos::fma(sine, z, -1.0 / 5040);
  sine = Kokkos::fma(sine, z, 1.0 / 120);
  sine = Kokkos::fma(sine, z, -1.0 / 6);
  sine = Kokkos::fma(x * z, sine, x);
  double cosine = 1.0 / 20922789888000;
  cosine = Kokkos::fma(cosine, z, -1.0 / 87178291200);
  cosine = Kokkos::fma(cosine, z, 1.0 / 479001600);
  cosine = Kokkos::fma(cosine, z, -1.0 / 3628800);
  cosine = Kokkos::fma(cosine, z, 1.0 / 40320);
  cosine = Kokkos::fma(cosine, z, -1.0 / 720);
  cosine = Kokkos::fma(cosine, z, 1.0 / 24);
  cosine = Kokkos::fma(cosine, z, -0.5);
  cosine = Kokkos::fma(cosine, z, 1.0);
  // Chosen by bits: a branch would keep loops from becoming vector instructions.
  const auto which = static_cast<std::uint64_t>(quarter);
  const std::uint64_t odd = 0 - (which & 1);
  const std::uint64_t negative = ((which + 1) & 2) << 62;
  return Kokkos::bit_cast<double>(((Kokkos::bit_cast<std::uint64_t>(sine) & odd) |
                                   (Kokkos::bit_cast<std::uint64_t>(cosine) & ~odd)) ^
                                  negative);
}

}  // namespace detail

/// A stream of random numbers addressed by element index: the same bits on every host and device.
struct RandomStream {
  std::uint64_t seed = 0;
  std::uint64_t stream = 0;  ///< a parameter, a data set, a purpose

  /// 128 bits for element `index`.
  [[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION constexpr Kokkos::Array<std::uint32_t, 4> bits(
      std::uint64_t index) const {
    return philox({static_cast<std::uint32_t>(index), static_cast<std::uint32_t>(index >> 32),
                   static_cast<std::uint32_t>(stream), static_cast<std::uint32_t>(stream >> 32)},
                  {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
  }
  /// Uniform in [0, 1) with 53 bits.
  [[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION constexpr double uniform(std::uint64_t index) const {
    const auto word = bits(index);
    const std::uint64_t mantissa = (static_cast<std::uint64_t>(word[0]) << 21) ^ (word[1] >> 11);
    return static_cast<double>(mantissa & ((1ULL << 53) - 1)) * 0x1p-53;
  }
  /// Standard normal (Box-Muller, one of the pair, so that every element stands alone).
  [[nodiscard]] KOKKOS_FORCEINLINE_FUNCTION double normal(std::uint64_t index) const {
    const auto word = bits(index);
    const double u = (detail::number_of(word[0]) + 0.5) * 0x1p-32;
    const double v = (detail::number_of(word[1]) + detail::number_of(word[2]) * 0x1p-32) * 0x1p-32;
    return Kokkos::sqrt(-2.0 * detail::natural_log(u)) * detail::cosine_of_turns(v);
  }
};

}  // namespace mics
