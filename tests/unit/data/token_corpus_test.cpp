// SPDX-License-Identifier: Apache-2.0
#include "data_files.hpp"
#include <mics/base/error.hpp>

#include <data/token_corpus.hpp>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace {

using data::CorpusOptions;
using data::Interval;
using data::Token;
using data::TokenCorpus;
using data::TokenSequence;
using mics::test::message_of;

/// A corpus of `count` tokens in which the token at i is i mod 251.
TokenCorpus counting_corpus(std::int64_t count, const CorpusOptions& options) {
  std::vector<Token> tokens;
  for (std::int64_t i = 0; i < count; ++i) tokens.push_back(static_cast<Token>(i % 251));
  return {TokenSequence(std::move(tokens), {}), options};
}

TEST(TokenCorpusTest, SplitsAsTheDocumentedExample) {
  const TokenCorpus corpus = counting_corpus(20, {.positions = 1, .validation_fraction = 0.2});

  EXPECT_EQ(corpus.training_runs(), (std::vector<Interval>{{0, 8}, {10, 8}}));
  EXPECT_EQ(corpus.validation_windows(), (std::vector<Interval>{{8, 2}, {18, 2}}));
  EXPECT_EQ(corpus.training_tokens(), 16);
}

TEST(TokenCorpusTest, TrainingAndValidationShareNoTokenAndCoverTheText) {
  for (const std::int64_t count : {90, 91, 98, 99, 500, 5000, 100003}) {
    const TokenCorpus corpus = counting_corpus(count, {.positions = 8});
    std::vector<int> uses(static_cast<std::size_t>(count), 0);
    std::int64_t training = 0;
    const auto use = [&](Interval interval) {
      for (std::int64_t i = interval.offset; i < interval.end(); ++i) {
        ++uses.at(static_cast<std::size_t>(i));
      }
    };

    for (const Interval run : corpus.training_runs()) {
      use(run);
      EXPECT_GE(run.length, 9);
      training += run.length;
    }
    for (const Interval window : corpus.validation_windows()) {
      EXPECT_EQ(window.length, 9);
      use(window);
    }

    EXPECT_LE(*std::ranges::max_element(uses), 1);
    EXPECT_EQ(corpus.training_tokens(), training);
    // Only a last piece of training text that holds no window is left out.
    EXPECT_LT(std::ranges::count(uses, 0), 9);
    const double share =
        9.0 * static_cast<double>(corpus.validation_window_count()) / static_cast<double>(count);
    EXPECT_NEAR(share, 0.1, count < 1000 ? 0.05 : 0.01) << count;
  }
}

TEST(TokenCorpusTest, SamplesLieWithinTrainingRuns) {
  const TokenCorpus corpus = counting_corpus(5000, {.positions = 8, .seed = 3});
  const std::vector<Interval> runs = corpus.training_runs();

  for (std::uint64_t i = 0; i < 2000; ++i) {
    const Interval window = corpus.sample(i);
    ASSERT_EQ(window.length, 9);
    const bool is_inside = std::ranges::any_of(runs, [&](const Interval& run) {
      return window.offset >= run.offset && window.end() <= run.end();
    });
    ASSERT_TRUE(is_inside) << "sample " << i;
  }
}

TEST(TokenCorpusTest, SamplesReachEveryStartAboutEquallyOften) {
  for (const std::int64_t count : {100, 111}) {  // the last run is shorter than the others
    const TokenCorpus corpus = counting_corpus(count, {.positions = 3, .validation_fraction = 0.2});
    std::map<std::int64_t, int> hits;
    std::size_t starts = 0;
    for (const Interval run : corpus.training_runs()) {
      starts += static_cast<std::size_t>(run.length - 3);
    }

    for (std::uint64_t i = 0; i < 200 * starts; ++i) ++hits[corpus.sample(i).offset];

    EXPECT_EQ(hits.size(), starts);
    for (const auto& [start, times] : hits) {
      EXPECT_GT(times, 130);
      EXPECT_LT(times, 280);
    }
  }
}

TEST(TokenCorpusTest, SampleDependsOnSeedAndIndexOnly) {
  const TokenCorpus one = counting_corpus(5000, {.positions = 8, .seed = 7});
  const TokenCorpus same = counting_corpus(5000, {.positions = 8, .seed = 7});
  const TokenCorpus other = counting_corpus(5000, {.positions = 8, .seed = 8});

  int equal_to_other = 0;
  for (std::uint64_t i = 500; i-- > 0;) {  // backwards: no state is kept between calls
    ASSERT_EQ(one.sample(i), same.sample(i));
    equal_to_other += one.sample(i) == other.sample(i) ? 1 : 0;
  }

  EXPECT_LT(equal_to_other, 10);
  EXPECT_EQ(one.sample(1ULL << 40), same.sample(1ULL << 40));
  EXPECT_NE(one.sample(0), one.sample(1ULL << 32));
}

TEST(TokenCorpusTest, ValidationLimitSpreadsOverTheText) {
  const TokenCorpus all = counting_corpus(50000, {.positions = 8});
  const TokenCorpus few = counting_corpus(50000, {.positions = 8, .validation_window_limit = 5});

  ASSERT_EQ(few.validation_window_count(), 5);
  const std::int64_t count = all.validation_window_count();
  for (std::int64_t i = 0; i < 5; ++i) {
    EXPECT_EQ(few.validation_window(i), all.validation_window(i * count / 5));
  }
}

TEST(TokenCorpusTest, TrainingRunsUpToALimitSpreadOverTheText) {
  const TokenCorpus corpus = counting_corpus(50000, {.positions = 8});
  const std::vector<Interval> all = corpus.training_runs();
  ASSERT_GT(all.size(), 8U);

  const std::vector<Interval> some = corpus.training_runs(3 * all.front().length);
  const std::vector<Interval> least = corpus.training_runs(1);

  ASSERT_EQ(some.size(), 3U);
  for (std::size_t i = 0; i < 3; ++i) EXPECT_EQ(some[i], all[i * all.size() / 3]);
  EXPECT_EQ(least, (std::vector<Interval>{all.front()}));
  EXPECT_EQ(corpus.training_runs(1 << 30), all);
}

TEST(TokenCorpusTest, TooLittleTextSaysHowMuchIsNeeded) {
  const auto message = message_of([] { static_cast<void>(counting_corpus(89, {.positions = 8})); });

  EXPECT_EQ(message,
            "text: expected at least 90 bytes, found 89; give more text, fewer positions, or a "
            "larger validation fraction");
}

TEST(TokenCorpusTest, ImpossibleOptionsAreRefused) {
  EXPECT_THROW(counting_corpus(100, {.positions = 0}), mics::ArgumentError);
  for (const double fraction : {0.0, 0.51, -1.0, 0.0 / 0.0, 1e-300}) {
    EXPECT_THROW(counting_corpus(100, {.positions = 1, .validation_fraction = fraction}),
                 mics::ArgumentError);
  }
}

}  // namespace
