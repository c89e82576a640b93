// SPDX-License-Identifier: Apache-2.0
#include <mics/base/random.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>

namespace mics {
namespace {

// Known answers that are published with the generator.
TEST(PhiloxTest, GivesThePublishedAnswers) {
  using Word = std::array<std::uint32_t, 4>;
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
