// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>

#include <data/bigram.hpp>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using data::BigramModel;
using data::Interval;
using data::Token;
using data::TokenSequence;

/// Texts, or windows, end to end in one sequence.
struct Texts {
  TokenSequence tokens;
  std::vector<Interval> intervals;
};

Texts texts_of(const std::vector<std::vector<Token>>& parts, std::int64_t vocabulary = 256) {
  std::vector<Token> tokens;
  std::vector<Interval> intervals;
  for (const auto& part : parts) {
    intervals.push_back(
        {static_cast<std::int64_t>(tokens.size()), static_cast<std::int64_t>(part.size())});
    tokens.insert(tokens.end(), part.begin(), part.end());
  }
  return {TokenSequence(std::move(tokens), {.vocabulary = vocabulary}), std::move(intervals)};
}

Texts texts_of(const std::vector<std::string>& parts) {
  std::vector<std::vector<Token>> tokens;
  for (const std::string& part : parts) tokens.emplace_back(part.begin(), part.end());
  return texts_of(tokens);
}

BigramModel fit(const Texts& texts, std::optional<double> alpha = {}) {
  return BigramModel::fit(texts.tokens, texts.intervals, alpha);
}

double bits(const BigramModel& model, const Texts& windows) {
  return model.nats_per_token(windows.tokens, windows.intervals) / std::log(2.0);
}

TEST(BigramTest, MatchesTheDocumentedExample) {
  const auto model = fit(texts_of({"aab"}), 1.0);

  EXPECT_DOUBLE_EQ(model.probability('a', 'a'), (1 + 3.0 / 259) / 3);
  EXPECT_DOUBLE_EQ(model.probability('a', 'b'), (1 + 2.0 / 259) / 3);
  EXPECT_DOUBLE_EQ(model.probability('a', 'c'), (0 + 1.0 / 259) / 3);
  EXPECT_DOUBLE_EQ(model.probability('b', 'a'), 3.0 / 259);  // b has no successor: single bytes
  EXPECT_EQ(model.total(), 3);
}

TEST(BigramTest, LossOfAHandComputedWindow) {
  const auto model = fit(texts_of({"aab"}), 1.0);

  // b -> a and a -> a; the first byte is context only.
  const double expected = -(std::log2(3.0 / 259) + std::log2((1 + 3.0 / 259) / 3)) / 2;
  EXPECT_NEAR(bits(model, texts_of({"baa"})), expected, 1e-12);
  EXPECT_NEAR(bits(model, texts_of(std::vector<std::string>{"baa", "baa"})), expected, 1e-12);
  EXPECT_EQ(bits(model, texts_of(std::vector<std::string>{})), 0);
}

TEST(BigramTest, CountsNoPairAcrossTexts) {
  const auto model = fit(texts_of(std::vector<std::string>{"aa", "bb"}), 1.0);

  EXPECT_DOUBLE_EQ(model.probability('a', 'b'), (0 + 3.0 / 260) / 2);
}

TEST(BigramTest, ProbabilitiesOfAllBytesSumToOne) {
  const auto model = fit(texts_of({"the quick brown fox jumps over the lazy dog"}));

  for (const Token previous : {Token{0}, Token{'e'}, Token{'g'}, Token{255}}) {
    double sum = 0;
    for (Token next = 0; next < 256; ++next) sum += model.probability(previous, next);
    EXPECT_NEAR(sum, 1, 1e-12);
  }
}

TEST(BigramTest, ChoosesASmallWeightForPredictableAndALargeOneForRandomText) {
  std::vector<Token> predictable;
  std::vector<Token> random;
  std::vector<Token> more;
  std::uint64_t state = 1;
  const auto next = [&] {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<Token>(state >> 56);
  };
  for (Token i = 0; i < 20000; ++i) {
    predictable.push_back('a' + i % 26);
    random.push_back(next());
  }
  for (int i = 0; i < 20000; ++i) more.push_back(next());

  const auto sure = fit(texts_of({predictable}));
  const auto unsure = fit(texts_of({random}));

  EXPECT_LT(sure.alpha(), 1);
  EXPECT_GT(unsure.alpha(), 100);
  EXPECT_LT(bits(sure, texts_of({predictable})), 0.01);
  EXPECT_NEAR(bits(unsure, texts_of({more})), 8, 0.1);
}

TEST(BigramTest, LargeVocabulariesAreCountedAlike) {
  constexpr std::int64_t vocabulary = 50304;
  std::vector<Token> text;
  std::map<std::pair<Token, Token>, int> pairs;
  std::map<Token, int> singles;
  std::map<Token, int> befores;
  for (Token i = 0; i < 200000; ++i) {  // more than one buffer
    text.push_back(i * i % 211 * 200 + i % 3);
    ++singles[text.back()];
    if (i > 0) {
      ++pairs[{text[i - 1], text[i]}];
      ++befores[text[i - 1]];
    }
  }

  const auto model = fit(texts_of({text}, vocabulary), 2.0);

  EXPECT_EQ(model.total(), 200000);
  for (const auto& [pair, count] : pairs) {
    const double of_next = (singles[pair.second] + 1.0) / (200000.0 + vocabulary);
    const double expected = (count + 2 * of_next) / (befores[pair.first] + 2.0);
    ASSERT_NEAR(model.probability(pair.first, pair.second), expected, 1e-14);
  }
  EXPECT_GT(model.probability(50303, 50303), 0);
}

TEST(BigramTest, TextsWithoutATokenAreRefused) {
  EXPECT_THROW((void)fit(texts_of(std::vector<std::string>{})), mics::ArgumentError);
  EXPECT_THROW((void)fit(texts_of({std::string()})), mics::ArgumentError);
}

}  // namespace
