// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <vector>

namespace data {

using Bytes = std::vector<std::uint8_t>;
using ByteSpan = std::span<const std::uint8_t>;

struct CorpusOptions {
  int positions = 128;               // a window holds positions + 1 bytes: inputs and targets
  double validation_fraction = 0.1;  // more than 0, at most 0.5
  std::int64_t validation_window_limit = 0;  // 0: all; else that many, spread evenly
  std::uint64_t seed = 0;                    // of the training windows
};

/// Text of files as bytes, cut into training and validation, served as windows.
///
/// Files are read in the order given; a folder stands for the regular files below it, sorted by
/// path, without those whose name or folder begins with '.', symbolic links, and binary files (a
/// NUL among the first 8000 bytes, git's rule). A file that is named itself is always read. Texts
/// are joined without a separator.
///
/// The joined text is cut into blocks of a few windows, and every k-th block, k = round(1 /
/// validation_fraction), is for validation. Blocks, rather than the tail of each file, give the
/// validation text the mixture of languages and topics of the training text whatever the sizes of
/// the files, and small files need not hold a window. All models learn from the same bytes: no
/// training window, and no pair of the bigram model, touches a validation block. Names in a
/// validation block may occur in the training blocks beside it, which a model with a longer context
/// can use; that is the ability that it is compared for.
///
/// Example: 10 windows of 2 bytes, fraction 0.2: blocks of 1 window, blocks 4 and 9 are for
/// validation, training runs are bytes [0, 8) and [10, 18).
class ByteCorpus {
 public:
  /// Reads the files. Local: every rank reads them.
  /// \throws std::runtime_error if an input does not exist, cannot be read, or holds too little
  /// text
  ByteCorpus(const std::vector<std::filesystem::path>& inputs, const CorpusOptions& options);

  /// The same over text in memory.
  ByteCorpus(Bytes text, const CorpusOptions& options);

  // Spans point into the text.
  ByteCorpus(const ByteCorpus&) = delete;
  ByteCorpus& operator=(const ByteCorpus&) = delete;

  [[nodiscard]] const std::vector<std::filesystem::path>& files() const { return files_; }
  [[nodiscard]] std::int64_t bytes() const { return static_cast<std::int64_t>(text_.size()); }
  [[nodiscard]] std::int64_t training_bytes() const;
  [[nodiscard]] int window_bytes() const { return options_.positions + 1; }

  /// Contiguous pieces of training text, each at least one window long.
  [[nodiscard]] const std::vector<ByteSpan>& training_runs() const { return runs_; }

  /// Training window `global_index`: depends on the seed and the index only, so that any division
  /// of indices among ranks trains on the same global batches. Every start within a run is equally
  /// likely.
  [[nodiscard]] ByteSpan sample(std::uint64_t global_index) const;

  /// Validation windows: fixed, disjoint, in the order of the text.
  [[nodiscard]] const std::vector<ByteSpan>& validation_windows() const { return windows_; }

 private:
  void split();

  CorpusOptions options_;
  std::vector<std::filesystem::path> files_;
  Bytes text_;
  std::vector<ByteSpan> runs_;
  std::vector<std::uint64_t> starts_;  // window starts in the runs up to and including this one
  std::vector<ByteSpan> windows_;
};

}  // namespace data
