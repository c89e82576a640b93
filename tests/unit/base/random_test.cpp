// SPDX-License-Identifier: Apache-2.0
#include <mics/base/random.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numbers>

namespace mics {
namespace {

// Known answers that are published with the generator.
TEST(PhiloxTest, GivesThePublishedAnswers) {
  using Word = Kokkos::Array<std::uint32_t, 4>;
  constexpr std::uint32_t ones = 0xffffffffU;

  EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Word{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox({ones, ones, ones, ones}, {ones, ones}),
            (Word{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Word{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(RandomStreamTest, HasTheMomentsOfItsDistributions) {
  const RandomStream stream{7, 3};
  constexpr std::uint64_t n = 200'000;
  double uniform = 0;
  double normal = 0;
  double squares = 0;
  double fourth = 0;
  for (std::uint64_t i = 0; i < n; ++i) {
    const double u = stream.uniform(i);
    const double x = stream.normal(i);
    ASSERT_TRUE(u >= 0 && u < 1);
    uniform += u / n;
    normal += x / n;
    squares += x * x / n;
    fourth += x * x * x * x / n;
  }

  // Five standard errors.
  EXPECT_NEAR(uniform, 0.5, 5 * std::sqrt(1.0 / 12 / n));
  EXPECT_NEAR(normal, 0, 5 * std::sqrt(1.0 / n));
  EXPECT_NEAR(squares, 1, 5 * std::sqrt(2.0 / n));
  EXPECT_NEAR(fourth, 3, 5 * std::sqrt(96.0 / n));
}

// Box and Muller's formula in the precision of long double.
long double exact_normal(const RandomStream& stream, std::uint64_t index) {
  const auto word = stream.bits(index);
  const long double u = (static_cast<long double>(word[0]) + 0.5L) * 0x1p-32L;
  const double v =
      (static_cast<double>(word[1]) + static_cast<double>(word[2]) * 0x1p-32) * 0x1p-32;
  return std::sqrt(-2 * std::log(u)) *
         std::cos(2 * std::numbers::pi_v<long double> * static_cast<long double>(v));
}

TEST(RandomStreamTest, NormalNumbersAreThoseOfTheFormula) {
  const RandomStream stream{1234567890123, 42};
  for (std::uint64_t i = 0; i < 100'000; ++i) {
    ASSERT_NEAR(stream.normal(i), static_cast<double>(exact_normal(stream, i)), 2e-15) << i;
  }
}

TEST(RandomStreamTest, LogarithmAndCosineHoldUpToTheEndsOfTheirRanges) {
  const double step = 0x1p-33;  // the least u; u is an odd multiple of it
  for (const double u : {step, 3 * step, 0.25 - step, 0.25 + step, 0.5 - step, 0.5 + step,
                         std::sqrt(0.5), 1 - 3 * step, 1 - step}) {
    const double expected = static_cast<double>(std::log(static_cast<long double>(u)));
    EXPECT_NEAR(detail::natural_log(u), expected, -4e-16 * expected) << u;
  }
  for (int eighth = 0; eighth <= 8; ++eighth) {
    for (const double off : {-0x1p-53, -0x1p-30, 0.0, 0x1p-30}) {
      const double v = 0.125 * eighth + off;
      if (v < 0 || v >= 1) continue;
      const long double turns = 2 * std::numbers::pi_v<long double>;
      EXPECT_NEAR(detail::cosine_of_turns(v), static_cast<double>(std::cos(turns * v)), 2.3e-16)
          << v;
    }
  }
}

// Initial values of every build, CPU and device.
TEST(RandomStreamTest, NormalNumbersHaveTheseBits) {
  const RandomStream stream{7, 3};
  EXPECT_EQ(stream.normal(5), -0x1.2a92888c05c75p-1);
  EXPECT_EQ(stream.normal((1U << 20) - 1), -0x1.b44c252b21304p+1);
}

TEST(RandomStreamTest, ElementsSeedsAndStreamsDiffer) {
  const RandomStream a{1, 1};

  EXPECT_NE(a.bits(0), a.bits(1));
  EXPECT_NE(a.bits(0), a.bits(std::uint64_t{1} << 32));
  EXPECT_NE(a.bits(0), (RandomStream{2, 1}.bits(0)));
  EXPECT_NE(a.bits(0), (RandomStream{1, 2}.bits(0)));
  EXPECT_EQ(a.bits(5), (RandomStream{1, 1}.bits(5)));
}

}  // namespace
}  // namespace mics
