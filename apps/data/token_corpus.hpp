// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <data/token_sequence.hpp>

#include <cstdint>
#include <vector>

namespace data {

struct CorpusOptions {
  int positions = 128;               // a window holds positions + 1 tokens: inputs and targets
  double validation_fraction = 0.1;  // more than 0, at most 0.5
  std::int64_t validation_window_limit = 0;  // 0: all; else that many, spread evenly
  std::uint64_t seed = 0;                    // of the training windows
};

/// A sequence of tokens cut into training and validation, served as windows.
///
/// The sequence is cut into blocks of a few windows, and every k-th block, k = round(1 /
/// validation_fraction), is for validation. Blocks, rather than the tail of each file, give the
/// validation text the mixture of languages and topics of the training text whatever the sizes of
/// the files, and small files need not hold a window. All models learn from the same tokens: no
/// training window, and no pair of the bigram model, touches a validation block. Names in a
/// validation block may occur in the training blocks beside it, which a model with a longer context
/// can use; that is the ability that it is compared for.
///
/// All of it is arithmetic on positions: a corpus takes no memory beside its sequence.
///
/// Example: 10 windows of 2 tokens, fraction 0.2: blocks of 1 window, blocks 4 and 9 are for
/// validation, training runs are tokens [0, 8) and [10, 18).
class TokenCorpus {
 public:
  /// \throws mics::ArgumentError if the options are impossible or there are too few tokens
  TokenCorpus(TokenSequence tokens, const CorpusOptions& options);

  [[nodiscard]] const TokenSequence& tokens() const { return tokens_; }
  [[nodiscard]] int window_tokens() const { return options_.positions + 1; }
  [[nodiscard]] std::int64_t training_tokens() const;

  /// Contiguous pieces of training text, each at least one window long, in the order of the text.
  /// \param[in] most_tokens  0: all; else whole runs spread evenly, together at most that many
  /// tokens or one run
  [[nodiscard]] std::vector<Interval> training_runs(std::int64_t most_tokens = 0) const;

  /// Training window `global_index`: depends on the seed and the index only, so that any division
  /// of indices among ranks trains on the same global batches. Every start within a run is equally
  /// likely.
  [[nodiscard]] Interval sample(std::uint64_t global_index) const;

  /// Validation windows: fixed, disjoint, in the order of the text.
  [[nodiscard]] std::int64_t validation_window_count() const;
  /// \pre 0 <= index < validation_window_count()
  [[nodiscard]] Interval validation_window(std::int64_t index) const;
  [[nodiscard]] std::vector<Interval> validation_windows() const;

 private:
  [[nodiscard]] std::int64_t run_count() const;
  [[nodiscard]] Interval run(std::int64_t index) const;
  [[nodiscard]] std::int64_t all_validation_windows() const;

  TokenSequence tokens_;
  CorpusOptions options_;
  std::int64_t block_ = 0;              // tokens
  std::int64_t period_ = 0;             // blocks; the last of each is for validation
  std::int64_t validation_blocks_ = 0;  // whole periods
};

}  // namespace data
