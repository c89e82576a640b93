// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/random.hpp>

#include <data/token_corpus.hpp>

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

namespace data {

namespace {

constexpr std::uint64_t window_stream =
    0x636f72707573;  // "corpus": apart from streams of parameters
constexpr std::int64_t most_windows_a_block = 16;
constexpr std::int64_t wanted_validation_blocks = 8;

}  // namespace

TokenCorpus::TokenCorpus(TokenSequence tokens, const CorpusOptions& options)
    : tokens_(std::move(tokens)), options_(options) {
  if (options_.positions < 1) {
    mics::raise<mics::ArgumentError>({.object = "positions",
                                      .expected = "at least 1",
                                      .found = std::to_string(options_.positions),
                                      .remedy = "change the deck"});
  }
  if (!(options_.validation_fraction > 0 && options_.validation_fraction <= 0.5)) {
    mics::raise<mics::ArgumentError>({.object = "validation fraction",
                                      .expected = "more than 0 and at most 0.5",
                                      .found = std::to_string(options_.validation_fraction),
                                      .remedy = "change the deck"});
  }
  const std::int64_t window = window_tokens();
  // Beyond 2^40 no text is long enough, and a product with a window still fits.
  constexpr double longest_period = 1099511627776.0;
  period_ = static_cast<std::int64_t>(
      std::llround(std::min(1 / options_.validation_fraction, longest_period)));
  const std::int64_t count = tokens_.count();
  if (count / window < period_) {
    mics::raise<mics::ArgumentError>(
        {.object = "text",
         .expected = "at least " + std::to_string(period_ * window) + " " + tokens_.unit(),
         .found = std::to_string(count),
         .remedy = "give more text, fewer positions, or a larger validation fraction"});
  }
  block_ = window * std::clamp<std::int64_t>(count / (window * period_ * wanted_validation_blocks),
                                             1, most_windows_a_block);
  validation_blocks_ = count / (period_ * block_);
}

std::int64_t TokenCorpus::run_count() const {
  const std::int64_t tail = tokens_.count() - validation_blocks_ * period_ * block_;
  return validation_blocks_ + (tail >= window_tokens() ? 1 : 0);
}

Interval TokenCorpus::run(std::int64_t index) const {
  const std::int64_t begin = index * period_ * block_;
  const std::int64_t length =
      index < validation_blocks_ ? (period_ - 1) * block_ : tokens_.count() - begin;
  return {begin, length};
}

std::int64_t TokenCorpus::training_tokens() const {
  const std::int64_t runs = run_count();
  return (runs - 1) * run(0).length + run(runs - 1).length;
}

std::vector<Interval> TokenCorpus::training_runs(std::int64_t most_tokens) const {
  const std::int64_t runs = run_count();
  const std::int64_t all = training_tokens();
  std::int64_t chosen = runs;
  if (most_tokens > 0 && most_tokens < all) {
    chosen = std::clamp<std::int64_t>(most_tokens / std::max(run(0).length, run(runs - 1).length),
                                      1, runs);
  }
  std::vector<Interval> result;
  for (std::int64_t i = 0; i < chosen; ++i) {
    // i * runs / chosen, in parts that stay below 2^63.
    result.push_back(run(i * (runs / chosen) + i * (runs % chosen) / chosen));
  }
  return result;
}

Interval TokenCorpus::sample(std::uint64_t global_index) const {
  const std::int64_t window = window_tokens();
  const std::int64_t runs = run_count();
  const std::int64_t starts_of_a_run = run(0).length - window + 1;
  const std::int64_t starts = (runs - 1) * starts_of_a_run + run(runs - 1).length - window + 1;
  const auto word = mics::RandomStream{options_.seed, window_stream}.bits(global_index);
  const std::uint64_t random = static_cast<std::uint64_t>(word[0]) << 32 | word[1];
  // Uneven by less than starts / 2^64.
  const auto start = static_cast<std::int64_t>(random % static_cast<std::uint64_t>(starts));
  const std::int64_t index = std::min(start / starts_of_a_run, runs - 1);
  return {run(index).offset + start - index * starts_of_a_run, window};
}

std::int64_t TokenCorpus::all_validation_windows() const {
  return validation_blocks_ * (block_ / window_tokens());
}

std::int64_t TokenCorpus::validation_window_count() const {
  const std::int64_t limit = options_.validation_window_limit;
  const std::int64_t all = all_validation_windows();
  return limit > 0 ? std::min(limit, all) : all;
}

Interval TokenCorpus::validation_window(std::int64_t index) const {
  const std::int64_t window = window_tokens();
  const std::int64_t all = all_validation_windows();
  const std::int64_t chosen = validation_window_count();
  const std::int64_t number = index * (all / chosen) + index * (all % chosen) / chosen;
  const std::int64_t of_a_block = block_ / window;
  const std::int64_t block = number / of_a_block;
  return {(block * period_ + period_ - 1) * block_ + number % of_a_block * window, window};
}

std::vector<Interval> TokenCorpus::validation_windows() const {
  std::vector<Interval> result;
  for (std::int64_t i = 0; i < validation_window_count(); ++i) {
    result.push_back(validation_window(i));
  }
  return result;
}

}  // namespace data
