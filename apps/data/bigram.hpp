// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace data {

/// The probability of a byte given the one before it: what a model with a longer context has to
/// beat.
///
/// Counts interpolated with the frequencies of single bytes (a Dirichlet prior of weight alpha
/// around them; MacKay and Peto, "A hierarchical Dirichlet language model", 1995):
///
///   p(b | a) = (count(a, b) + alpha * p(b)) / (count(a, any) + alpha),   p(b) = (count(b) + 1) /
///   (N + 256)
///
/// Example: texts {"aab"}, alpha = 1: p(a) = 3/259, p(b) = 2/259; after one a of two comes an a,
/// p(a | a) = (1 + 3/259) / (2 + 1).
class BigramModel {
 public:
  using Span = std::span<const std::uint8_t>;

  /// \param[in] texts  pairs are counted within each text
  /// \param[in] alpha  more than 0; without it, the best of a geometric grid for the last tenth of
  /// each text given the rest; all text
  ///                   is counted afterwards
  /// \throws std::runtime_error if no text holds a byte
  static BigramModel fit(const std::vector<Span>& texts, std::optional<double> alpha = {});

  [[nodiscard]] double alpha() const { return alpha_; }
  [[nodiscard]] double probability(std::uint8_t previous, std::uint8_t next) const;

  /// Mean of -log2 p over bytes 1, 2, ... of each window given the byte before: exactly the
  /// positions on which a model of `window bytes - 1` positions is scored. 0 if there are none.
  [[nodiscard]] double bits_per_byte(const std::vector<Span>& windows) const;

 private:
  explicit BigramModel(double alpha) : alpha_(alpha), pairs_(256 * 256) {}
  void count(Span text);

  double alpha_;
  std::vector<std::int64_t> pairs_;          // [previous * 256 + next]
  std::array<std::int64_t, 256> bytes_{};    // all bytes
  std::array<std::int64_t, 256> befores_{};  // bytes that have a successor
  std::int64_t total_ = 0;
};

}  // namespace data
