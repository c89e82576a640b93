// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_BitManipulation.hpp>
#include <Kokkos_Macros.hpp>

#include <cstdint>

namespace mics {

/// bfloat16 in two bytes: storage with exact widening and rounding to nearest even.
///
/// A host-only Kokkos stores its own `bhalf_t` in four bytes, which would make files and messages
/// differ between machines; this type has the bits of the device's native type everywhere.
struct bf16 {
  std::uint16_t bits = 0;

  bf16() = default;
  KOKKOS_INLINE_FUNCTION explicit bf16(float value) {
    const auto u = Kokkos::bit_cast<std::uint32_t>(value);
    // A NaN keeps its sign and becomes quiet: rounding could otherwise carry it to infinity.
    const std::uint32_t rounded = u + 0x7fffU + ((u >> 16) & 1U);
    bits = static_cast<std::uint16_t>((value != value ? u | 0x00400000U : rounded) >> 16);
  }
  KOKKOS_INLINE_FUNCTION explicit bf16(double value);
  KOKKOS_INLINE_FUNCTION explicit operator float() const {
    return Kokkos::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  KOKKOS_INLINE_FUNCTION explicit operator double() const {
    return static_cast<double>(static_cast<float>(*this));
  }
  friend bool operator==(const bf16&, const bf16&) = default;
};

/// IEEE binary16 in two bytes, exact widening, rounding to nearest even, subnormals kept.
struct fp16 {
  std::uint16_t bits = 0;

  fp16() = default;
  KOKKOS_INLINE_FUNCTION explicit fp16(float value) {
    const auto u = Kokkos::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (u >> 16) & 0x8000U;
    const std::uint32_t magnitude = u & 0x7fffffffU;
    std::uint32_t result = 0;
    if (magnitude > 0x7f800000U) {
      result = 0x7e00U;  // quiet NaN
    } else if (magnitude >= 0x477ff000U) {
      result = 0x7c00U;  // rounds to infinity
    } else if (magnitude < 0x38800000U) {
      // Subnormal: adding 0.5 in fp32 aligns the mantissa so that the hardware rounds to even.
      const float shifted = Kokkos::bit_cast<float>(magnitude) + 0.5F;
      result = Kokkos::bit_cast<std::uint32_t>(shifted) - 0x3f000000U;
    } else {
      result = (magnitude - 0x38000000U + 0x0fffU + ((magnitude >> 13) & 1U)) >> 13;
    }
    bits = static_cast<std::uint16_t>(sign | result);
  }
  KOKKOS_INLINE_FUNCTION explicit fp16(double value);
  KOKKOS_INLINE_FUNCTION explicit operator float() const {
    const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000U) << 16;
    const std::uint32_t magnitude = bits & 0x7fffU;
    if (magnitude >= 0x7c00U) {
      return Kokkos::bit_cast<float>(sign | 0x7f800000U | ((magnitude & 0x03ffU) << 13));
    }
    // Scaling by 2^112 moves the exponent bias from 15 to 127 and normalises subnormals exactly.
    const float scaled = Kokkos::bit_cast<float>(magnitude << 13) * 0x1p112F;
    return Kokkos::bit_cast<float>(sign | Kokkos::bit_cast<std::uint32_t>(scaled));
  }
  KOKKOS_INLINE_FUNCTION explicit operator double() const {
    return static_cast<double>(static_cast<float>(*this));
  }
  friend bool operator==(const fp16&, const fp16&) = default;
};

static_assert(sizeof(bf16) == 2 && sizeof(fp16) == 2);

namespace detail {

// fp64 to fp32 with rounding to odd: the second rounding, to 16 bits, is then the only one that
// counts, as if fp64 had been rounded at once.
KOKKOS_INLINE_FUNCTION float narrow_to_odd(double value) {
  float narrowed = static_cast<float>(value);
  const auto back = static_cast<double>(narrowed);
  if (back == value || value != value) return narrowed;
  auto u = Kokkos::bit_cast<std::uint32_t>(narrowed);
  const bool rounded_away = (value < 0 ? -back : back) > (value < 0 ? -value : value);
  if (rounded_away) --u;  // towards zero; the sticky bit below then makes it odd
  return Kokkos::bit_cast<float>(u | 1U);
}

}  // namespace detail

KOKKOS_INLINE_FUNCTION bf16::bf16(double value) : bf16(detail::narrow_to_odd(value)) {}
KOKKOS_INLINE_FUNCTION fp16::fp16(double value) : fp16(detail::narrow_to_odd(value)) {}

}  // namespace mics
