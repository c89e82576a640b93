// SPDX-License-Identifier: Apache-2.0
#include <mics/base/half.hpp>
#include <mics/base/rounding.hpp>

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace mics {
namespace {

// Value of a 16-bit pattern by the definition of the format: no code shared with the library.
double value_of(std::uint16_t bits, int mantissa_bits, int bias) {
  const int exponent_bits = 15 - mantissa_bits;
  const int exponent = (bits >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const double mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = (bits & 0x8000) != 0 ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) {
    if (mantissa != 0) return std::numeric_limits<double>::quiet_NaN();
    return sign * std::numeric_limits<double>::infinity();
  }
  const double scale = std::ldexp(1.0, -mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(mantissa * scale, 1 - bias);
  return sign * std::ldexp(1 + mantissa * scale, exponent - bias);
}

// Nearest pattern by search among all finite ones, ties to the even pattern.
std::uint16_t nearest(double value, int mantissa_bits, int bias) {
  const std::uint16_t infinity =
      static_cast<std::uint16_t>(((1 << (15 - mantissa_bits)) - 1) << mantissa_bits);
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::abs(value);
  // Positive patterns ascend with their values; infinity stands for the next power of two.
  const auto at = [&](int pattern) {
    return pattern < infinity ? value_of(static_cast<std::uint16_t>(pattern), mantissa_bits, bias)
                              : std::ldexp(1.0, (1 << (15 - mantissa_bits)) - 1 - bias);
  };
  int low = 0;
  int high = infinity;
  if (magnitude >= at(infinity)) return static_cast<std::uint16_t>(sign | infinity);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (at(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - at(low);
  const double above = at(high) - magnitude;
  const bool up = above < below || (above == below && high % 2 == 0);
  return static_cast<std::uint16_t>(sign | (up ? high : low));
}

template <class Half>
struct Format;
template <>
struct Format<bf16> {
  static constexpr int mantissa_bits = 7;
  static constexpr int bias = 127;
};
template <>
struct Format<fp16> {
  static constexpr int mantissa_bits = 10;
  static constexpr int bias = 15;
};

template <class Half>
Half from_bits(int bits) {
  Half half;
  half.bits = static_cast<std::uint16_t>(bits);
  return half;
}

template <class Half>
class HalfTest : public testing::Test {};
using Halves = testing::Types<bf16, fp16>;
TYPED_TEST_SUITE(HalfTest, Halves);

TYPED_TEST(HalfTest, WidensEveryPatternExactly) {
  using F = Format<TypeParam>;
  for (int bits = 0; bits < 0x10000; ++bits) {
    const double expected = value_of(static_cast<std::uint16_t>(bits), F::mantissa_bits, F::bias);

    const auto found = static_cast<double>(from_bits<TypeParam>(bits));

    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(found)) << bits;
    } else {
      ASSERT_EQ(std::bit_cast<std::uint64_t>(found), std::bit_cast<std::uint64_t>(expected))
          << bits;
    }
  }
}

TYPED_TEST(HalfTest, NarrowsEveryPatternToItself) {
  for (int bits = 0; bits < 0x10000; ++bits) {
    const auto half = from_bits<TypeParam>(bits);
    const auto wide = static_cast<float>(half);

    const TypeParam again(wide);
    const TypeParam from_double(static_cast<double>(wide));

    if (std::isnan(wide)) {
      ASSERT_TRUE(std::isnan(static_cast<float>(again))) << bits;
      ASSERT_TRUE(std::isnan(static_cast<float>(from_double))) << bits;
    } else {
      ASSERT_EQ(again.bits, half.bits);
      ASSERT_EQ(from_double.bits, half.bits);
    }
  }
}

TYPED_TEST(HalfTest, RoundsToNearestEven) {
  using F = Format<TypeParam>;
  std::vector<double> values{0.0,       -0.0,  1e-300, 1e300, 65504,
                             65519.999, 65520, 3.4e38, 1e-45, 5e-8};
  // Around every boundary between neighbours, and the boundary itself: exact in fp64.
  for (int bits = 0; bits < 0x7fff; bits += 7) {
    const double a = value_of(static_cast<std::uint16_t>(bits), F::mantissa_bits, F::bias);
    const double b = value_of(static_cast<std::uint16_t>(bits + 1), F::mantissa_bits, F::bias);
    if (!std::isfinite(a) || !std::isfinite(b)) continue;
    const double middle = (a + b) / 2;
    for (const double v : {middle, std::nextafter(middle, a), std::nextafter(middle, b)}) {
      values.push_back(v);
      values.push_back(-v);
    }
  }
  for (const double value : values) {
    const std::uint16_t expected = nearest(value, F::mantissa_bits, F::bias);
    ASSERT_EQ(TypeParam(value).bits, expected) << value;

    const auto narrow = static_cast<float>(value);
    if (static_cast<double>(narrow) != value) continue;
    ASSERT_EQ(TypeParam(narrow).bits, expected) << value << " from fp32";
  }
}

TYPED_TEST(HalfTest, KeepsNansAndInfinities) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float infinity = std::numeric_limits<float>::infinity();
  // A NaN whose payload lies in the bits that are cut off must not become infinity.
  const auto low_payload = std::bit_cast<float>(0x7f800001U);

  EXPECT_TRUE(std::isnan(static_cast<float>(TypeParam(nan))));
  EXPECT_TRUE(std::isnan(static_cast<float>(TypeParam(low_payload))));
  EXPECT_EQ(static_cast<float>(TypeParam(infinity)), infinity);
  EXPECT_EQ(static_cast<float>(TypeParam(-infinity)), -infinity);
}

TYPED_TEST(HalfTest, ArraysRoundAsTheirElements) {
  // Lengths around those of vectors of all widths, bit patterns of every exponent.
  for (const std::int64_t count : {0, 1, 7, 16, 31, 33, 64, 65, 100'000}) {
    std::vector<float> wide;
    for (std::int64_t i = 0; i < count; ++i) {
      wide.push_back(std::bit_cast<float>(static_cast<std::uint32_t>(i) * 2654435761U));
    }
    std::vector<TypeParam> narrow(wide.size() + 1);
    narrow.back() = from_bits<TypeParam>(0x1234);

    round_all(wide.data(), narrow.data(), count);

    for (std::size_t i = 0; i < wide.size(); ++i) {
      ASSERT_EQ(narrow[i].bits, TypeParam(wide[i]).bits) << wide[i];
    }
    ASSERT_EQ(narrow.back().bits, 0x1234) << "written beyond " << count << " elements";
  }
}

}  // namespace
}  // namespace mics
