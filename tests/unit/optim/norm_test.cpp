// SPDX-License-Identifier: Apache-2.0
#include <mics/base/half.hpp>
#include <mics/optim/norm.hpp>
#include <mics/state/for_blocks.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace mics::optim {
namespace {

template <class T>
double norm_of(const std::vector<T>& values) {
  std::vector<double> partials(
      static_cast<std::size_t>(state::blocks_of(static_cast<std::int64_t>(values.size()))));
  return sum_of_squares(values.data(), dtype_of<T>, static_cast<std::int64_t>(values.size()),
                        partials);
}

TEST(NormTest, IsExactWhereEverySumIs) {
  for (const std::size_t count : {0UL, 1UL, 8UL, 4095UL, 4096UL, 4097UL, 100'003UL}) {
    std::vector<float> values(count);
    double expected = 0;
    for (std::size_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(static_cast<int>(i % 13) - 6);
      expected += static_cast<double>(values[i]) * static_cast<double>(values[i]);
    }

    EXPECT_EQ(norm_of(values), expected);
  }
}

template <class T>
void expect_exact_in_16_bits() {
  std::vector<T> values(10'000);
  double expected = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = T(static_cast<float>(static_cast<int>(i % 13) - 6) * 0.125F);
    expected += static_cast<double>(values[i]) * static_cast<double>(values[i]);
  }
  EXPECT_EQ(norm_of(values), expected);

  values[9999] = T(std::numeric_limits<float>::infinity());
  EXPECT_FALSE(std::isfinite(norm_of(values)));
}

TEST(NormTest, TakesGradientsOf16Bits) {
  expect_exact_in_16_bits<bf16>();
  expect_exact_in_16_bits<fp16>();
}

TEST(NormTest, IsFiniteExactlyIfEveryElementIs) {
  for (const std::size_t position : {0UL, 4096UL, 9999UL}) {
    std::vector<float> values(10'000, std::numeric_limits<float>::max());
    EXPECT_TRUE(std::isfinite(norm_of(values)));

    values[position] = std::numeric_limits<float>::infinity();
    EXPECT_FALSE(std::isfinite(norm_of(values)));

    values[position] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_FALSE(std::isfinite(norm_of(values)));
  }
}

TEST(NormTest, DoesNotLoseSmallElementsBesideManyOthers) {
  std::vector<float> values(1'000'000, 1e-3F);
  const double one = static_cast<double>(1e-3F) * static_cast<double>(1e-3F);

  EXPECT_NEAR(norm_of(values) / (one * 1e6), 1, 1e-12);
}

TEST(NormTest, HasTheBitsOfTheDefinitionWhateverTheThreads) {
  std::vector<double> values(50'001);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<double>(i));

  // Blocks of 4096; in a block eight interleaved sums, the rest to the first, added in order.
  double expected = 0;
  for (std::size_t begin = 0; begin < values.size(); begin += 4096) {
    const std::size_t end = std::min(values.size(), begin + 4096);
    double sums[8] = {};
    const std::size_t whole = begin + (end - begin) / 8 * 8;
    for (std::size_t i = begin; i < whole; ++i) sums[(i - begin) % 8] += values[i] * values[i];
    for (std::size_t i = whole; i < end; ++i) sums[0] += values[i] * values[i];
    double block = 0;
    for (const double s : sums) block += s;
    expected += block;
  }

  EXPECT_EQ(norm_of(values), expected);
}

}  // namespace
}  // namespace mics::optim
