// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>

#include <data/bigram.hpp>

#include <algorithm>
#include <array>
#include <cmath>

namespace data {

namespace {

constexpr std::int64_t largest_dense_vocabulary = 1024;
constexpr std::int64_t tokens_at_once = std::int64_t{1} << 16;

constexpr std::array<double, 17> alphas = [] {
  std::array<double, 17> grid{};
  double value = 1.0 / 16;
  for (double& alpha : grid) {
    alpha = value;
    value *= 2;
  }
  return grid;
}();

/// Calls single(token) for the tokens of an interval, and pair(token, next) where one follows in
/// it, in order. Takes a buffer of 64 Ki tokens.
template <class Single, class Pair>
void for_each_token(const TokenSequence& tokens, Interval interval, const Single& single,
                    const Pair& pair) {
  std::vector<Token> buffer(
      static_cast<std::size_t>(std::min<std::int64_t>(tokens_at_once, interval.length)));
  std::optional<Token> previous;
  for (std::int64_t begin = interval.offset; begin < interval.end(); begin += tokens_at_once) {
    const auto part = std::span(buffer).first(
        static_cast<std::size_t>(std::min(tokens_at_once, interval.end() - begin)));
    tokens.read(begin, part);
    for (const Token token : part) {
      if (previous) pair(*previous, token);
      single(token);
      previous = token;
    }
  }
}

}  // namespace

std::int64_t BigramModel::most_tokens(std::int64_t vocabulary) {
  return std::int64_t{1} << (vocabulary <= largest_dense_vocabulary ? 26 : 23);
}

BigramModel::BigramModel(const TokenSequence& tokens, std::span<const Interval> texts, double alpha)
    : alpha_(alpha),
      vocabulary_(tokens.vocabulary()),
      tokens_(static_cast<std::size_t>(vocabulary_)),
      befores_(static_cast<std::size_t>(vocabulary_)) {
  const bool is_dense = vocabulary_ <= largest_dense_vocabulary;
  if (is_dense) {
    table_.resize(static_cast<std::size_t>(vocabulary_ * vocabulary_));
  } else {
    std::int64_t pairs = 0;
    for (const Interval text : texts) pairs += std::max<std::int64_t>(0, text.length - 1);
    pairs_.reserve(static_cast<std::size_t>(pairs));
  }
  for (const Interval text : texts) {
    total_ += text.length;
    for_each_token(
        tokens, text, [&](Token token) { ++tokens_[token]; },
        [&](Token previous, Token next) {
          ++befores_[previous];
          if (is_dense) {
            ++table_[static_cast<std::size_t>(previous) * static_cast<std::size_t>(vocabulary_) +
                     next];
          } else {
            pairs_.push_back(static_cast<std::uint64_t>(previous) << 32 | next);
          }
        });
  }
  std::ranges::sort(pairs_);
}

BigramModel BigramModel::fit(const TokenSequence& tokens, std::span<const Interval> texts,
                             std::optional<double> alpha) {
  if (!alpha) {
    std::vector<Interval> kept;
    std::vector<Interval> held_out;
    for (const Interval text : texts) {
      const std::int64_t tail = text.length / 10;
      kept.push_back({text.offset, text.length - tail});
      // With the token before the tail.
      if (text.length > tail) held_out.push_back({text.end() - tail - 1, tail + 1});
    }
    const BigramModel trial(tokens, kept, 0);
    std::array<double, alphas.size()> nats{};
    for (const Interval text : held_out) {
      for_each_token(
          tokens, text, [](Token) {},
          [&](Token previous, Token next) {
            const auto pairs = static_cast<double>(trial.pair_count(previous, next));
            const double frequency = trial.frequency(next);
            const auto befores = static_cast<double>(trial.befores_[previous]);
            for (std::size_t i = 0; i < alphas.size(); ++i) {
              nats[i] -= std::log((pairs + alphas[i] * frequency) / (befores + alphas[i]));
            }
          });
    }
    alpha = alphas[static_cast<std::size_t>(std::ranges::min_element(nats) - nats.begin())];
  }
  BigramModel result(tokens, texts, *alpha);
  if (result.total_ == 0) {
    mics::raise<mics::ArgumentError>({.object = "texts",
                                      .expected = "at least one token",
                                      .found = "0",
                                      .remedy = "give more text"});
  }
  return result;
}

std::int64_t BigramModel::pair_count(Token previous, Token next) const {
  if (!table_.empty()) {
    return table_[static_cast<std::size_t>(previous) * static_cast<std::size_t>(vocabulary_) +
                  next];
  }
  const auto found =
      std::ranges::equal_range(pairs_, static_cast<std::uint64_t>(previous) << 32 | next);
  return static_cast<std::int64_t>(found.size());
}

double BigramModel::frequency(Token token) const {
  return (static_cast<double>(tokens_[token]) + 1) / static_cast<double>(total_ + vocabulary_);
}

double BigramModel::probability(Token previous, Token next) const {
  return (static_cast<double>(pair_count(previous, next)) + alpha_ * frequency(next)) /
         (static_cast<double>(befores_[previous]) + alpha_);
}

double BigramModel::nats_per_token(const TokenSequence& tokens,
                                   std::span<const Interval> windows) const {
  double nats = 0;
  std::int64_t positions = 0;
  for (const Interval window : windows) {
    for_each_token(
        tokens, window, [](Token) {},
        [&](Token previous, Token next) {
          nats -= std::log(probability(previous, next));
          ++positions;
        });
  }
  return positions == 0 ? 0 : nats / static_cast<double>(positions);
}

}  // namespace data
