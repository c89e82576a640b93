// SPDX-License-Identifier: Apache-2.0
#include <data/bigram.hpp>

#include <cmath>
#include <limits>
#include <stdexcept>

namespace data {

void BigramModel::count(Span text) {
  for (std::size_t i = 0; i < text.size(); ++i) {
    ++bytes_[text[i]];
    if (i + 1 < text.size()) {
      ++befores_[text[i]];
      ++pairs_[static_cast<std::size_t>(text[i]) * 256 + text[i + 1]];
    }
  }
  total_ += static_cast<std::int64_t>(text.size());
}

BigramModel BigramModel::fit(const std::vector<Span>& texts, std::optional<double> alpha) {
  if (!alpha) {
    BigramModel trial(0);
    std::vector<Span> held_out;
    for (const Span text : texts) {
      const std::size_t kept = text.size() - text.size() / 10;
      trial.count(text.first(kept));
      if (kept > 0) held_out.push_back(text.subspan(kept - 1));  // with the byte before the tail
    }
    double best = std::numeric_limits<double>::infinity();
    for (double candidate = 1.0 / 16; candidate <= 4096; candidate *= 2) {
      trial.alpha_ = candidate;
      const double bits = trial.bits_per_byte(held_out);
      if (bits < best) {
        best = bits;
        alpha = candidate;
      }
    }
  }
  BigramModel result(*alpha);
  for (const Span text : texts) result.count(text);
  if (result.total_ == 0) {
    throw std::runtime_error(
        "data::BigramModel: texts: expected at least one byte, found 0; give more text");
  }
  return result;
}

double BigramModel::probability(std::uint8_t previous, std::uint8_t next) const {
  const double of_byte =
      (static_cast<double>(bytes_[next]) + 1) / (static_cast<double>(total_) + 256);
  const auto pairs = pairs_[static_cast<std::size_t>(previous) * 256 + next];
  return (static_cast<double>(pairs) + alpha_ * of_byte) /
         (static_cast<double>(befores_[previous]) + alpha_);
}

double BigramModel::bits_per_byte(const std::vector<Span>& windows) const {
  double bits = 0;
  std::int64_t positions = 0;
  for (const Span window : windows) {
    for (std::size_t i = 1; i < window.size(); ++i) {
      bits -= std::log2(probability(window[i - 1], window[i]));
      ++positions;
    }
  }
  return positions == 0 ? 0 : bits / static_cast<double>(positions);
}

}  // namespace data
