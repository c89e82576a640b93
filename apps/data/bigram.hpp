// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <data/token_sequence.hpp>

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace data {

/// The probability of a token given the one before it: what a model with a longer context has to
/// beat.
///
/// Counts interpolated with the frequencies of single tokens (a Dirichlet prior of weight alpha
/// around them; MacKay and Peto, "A hierarchical Dirichlet language model", 1995), V tokens in the
/// vocabulary, N in the text:
///
///   p(b | a) = (count(a, b) + alpha * p(b)) / (count(a, any) + alpha)
///   p(b) = (count(b) + 1) / (N + V)
///
/// Example: texts {"aab"} of bytes, alpha = 1: p(a) = 3/259, p(b) = 2/259; after one a of two comes
/// an a, p(a | a) = (1 + 3/259) / (2 + 1).
///
/// Memory: 16 V bytes, and for pairs 8 V^2 up to V = 1024, else 8 a pair of the text.
class BigramModel {
 public:
  /// Tokens of text that are worth counting: below a second, and at most 64 MiB of pairs.
  [[nodiscard]] static std::int64_t most_tokens(std::int64_t vocabulary);

  /// \param[in] texts  pairs are counted within each
  /// \param[in] alpha  more than 0; without it, the best of a geometric grid for the last tenth of
  /// each text given the rest; all text is counted afterwards
  /// \throws mics::ArgumentError if no text holds a token
  static BigramModel fit(const TokenSequence& tokens, std::span<const Interval> texts,
                         std::optional<double> alpha = {});

  [[nodiscard]] double alpha() const { return alpha_; }
  /// Tokens that it was fitted to.
  [[nodiscard]] std::int64_t total() const { return total_; }
  [[nodiscard]] double probability(Token previous, Token next) const;

  /// Mean of -ln p over tokens 1, 2, ... of each window given the token before: exactly the
  /// positions on which a model of `window tokens - 1` positions is scored. 0 if there are none.
  [[nodiscard]] double nats_per_token(const TokenSequence& tokens,
                                      std::span<const Interval> windows) const;

 private:
  BigramModel(const TokenSequence& tokens, std::span<const Interval> texts, double alpha);
  [[nodiscard]] std::int64_t pair_count(Token previous, Token next) const;
  [[nodiscard]] double frequency(Token token) const;

  double alpha_;
  std::int64_t vocabulary_;
  std::vector<std::int64_t> table_;    // dense: [previous * V + next]
  std::vector<std::uint64_t> pairs_;   // else: previous << 32 | next of each pair, sorted
  std::vector<std::int64_t> tokens_;   // (V) all tokens
  std::vector<std::int64_t> befores_;  // (V) tokens that have a successor
  std::int64_t total_ = 0;
};

}  // namespace data
