// SPDX-License-Identifier: Apache-2.0
#include <data/bigram.hpp>
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using data::BigramModel;
using Bytes = std::vector<std::uint8_t>;

Bytes bytes_of(const std::string& text) { return {text.begin(), text.end()}; }

TEST(BigramTest, MatchesTheDocumentedExample) {
  const Bytes text = bytes_of("aab");

  const auto model = BigramModel::fit({text}, 1.0);

  EXPECT_DOUBLE_EQ(model.probability('a', 'a'), (1 + 3.0 / 259) / 3);
  EXPECT_DOUBLE_EQ(model.probability('a', 'b'), (1 + 2.0 / 259) / 3);
  EXPECT_DOUBLE_EQ(model.probability('a', 'c'), (0 + 1.0 / 259) / 3);
  EXPECT_DOUBLE_EQ(model.probability('b', 'a'), 3.0 / 259);  // b has no successor: single bytes
}

TEST(BigramTest, BitsPerByteOfAHandComputedWindow) {
  const Bytes text = bytes_of("aab");
  const Bytes window = bytes_of("baa");

  const auto model = BigramModel::fit({text}, 1.0);

  // b -> a and a -> a; the first byte is context only.
  const double expected = -(std::log2(3.0 / 259) + std::log2((1 + 3.0 / 259) / 3)) / 2;
  EXPECT_NEAR(model.bits_per_byte({window}), expected, 1e-12);
  EXPECT_NEAR(model.bits_per_byte({window, window}), expected, 1e-12);
  EXPECT_EQ(model.bits_per_byte({}), 0);
}

TEST(BigramTest, CountsNoPairAcrossTexts) {
  const Bytes first = bytes_of("aa");
  const Bytes second = bytes_of("bb");

  const auto model = BigramModel::fit({first, second}, 1.0);

  EXPECT_DOUBLE_EQ(model.probability('a', 'b'), (0 + 3.0 / 260) / 2);
}

TEST(BigramTest, ProbabilitiesOfAllBytesSumToOne) {
  const Bytes text = bytes_of("the quick brown fox jumps over the lazy dog");
  const auto model = BigramModel::fit({text});

  for (const int previous : {0, static_cast<int>('e'), static_cast<int>('g'), 255}) {
    double sum = 0;
    for (int next = 0; next < 256; ++next) {
      sum +=
          model.probability(static_cast<std::uint8_t>(previous), static_cast<std::uint8_t>(next));
    }
    EXPECT_NEAR(sum, 1, 1e-12);
  }
}

TEST(BigramTest, ChoosesASmallWeightForPredictableAndALargeOneForRandomText) {
  Bytes predictable;
  Bytes random;
  std::uint64_t state = 1;
  for (int i = 0; i < 20000; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    predictable.push_back(static_cast<std::uint8_t>('a' + i % 26));
    random.push_back(static_cast<std::uint8_t>(state >> 56));
  }

  const auto sure = BigramModel::fit({predictable});
  const auto unsure = BigramModel::fit({random});

  EXPECT_LT(sure.alpha(), 1);
  EXPECT_GT(unsure.alpha(), 100);
  EXPECT_LT(sure.bits_per_byte({predictable}), 0.01);
  Bytes more;
  for (int i = 0; i < 20000; ++i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    more.push_back(static_cast<std::uint8_t>(state >> 56));
  }
  EXPECT_NEAR(unsure.bits_per_byte({more}), 8, 0.1);
}

TEST(BigramTest, TextsWithoutAByteAreRefused) {
  EXPECT_THROW((void)BigramModel::fit({}), std::runtime_error);
  EXPECT_THROW((void)BigramModel::fit({BigramModel::Span{}}), std::runtime_error);
}

}  // namespace
