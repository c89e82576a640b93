// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/layout/interval.hpp>

#include <data/file_bytes.hpp>
#include <data/npy.hpp>

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace data {

/// The number of a word, of a part of a word, or of a byte: 0 to vocabulary - 1.
using Token = std::uint32_t;
using mics::layout::Interval;

/// What the files hold.
enum class TokenFormat : std::uint8_t {
  bytes,   ///< text: each byte is a token
  uint16,  ///< raw little-endian numbers (.bin)
  uint32,
  npy,  ///< one-dimensional NumPy arrays of uint8, uint16, uint32, int32 or int64
};

/// "bytes", "uint16", ...
[[nodiscard]] std::string name(TokenFormat format);

struct SequenceOptions {
  TokenFormat format = TokenFormat::bytes;
  std::int64_t vocabulary = 256;
};

/// The tokens of files, end to end, as one sequence with 64-bit positions.
///
/// Files are read in the order given; a folder stands for the regular files below it, sorted by
/// path, without those whose name or folder begins with '.' and symbolic links: of text all but
/// binary files (a NUL among the first 8000 bytes, git's rule), else those that end in .bin (raw)
/// or .npy. A file that is named itself is always read. Files are joined without a separator.
/// Large files are mapped, not copied: see FileBytes.
///
/// Nobody gets a token outside the vocabulary: `read` checks what it copies.
class TokenSequence {
 public:
  /// Opens the files. Local: every rank opens them.
  /// \throws mics::ArgumentError naming the input that does not exist, cannot be read, holds
  /// nothing, or is no file of this format
  TokenSequence(const std::vector<std::filesystem::path>& inputs, const SequenceOptions& options);

  /// The same over tokens in memory.
  TokenSequence(std::vector<Token> tokens, const SequenceOptions& options);

  // Pieces point into the files.
  TokenSequence(TokenSequence&&) noexcept = default;
  TokenSequence(const TokenSequence&) = delete;

  [[nodiscard]] const std::vector<std::filesystem::path>& files() const { return files_; }
  [[nodiscard]] std::int64_t count() const { return count_; }
  [[nodiscard]] std::int64_t vocabulary() const { return options_.vocabulary; }
  /// "bytes" or "tokens".
  [[nodiscard]] const char* unit() const {
    return options_.format == TokenFormat::bytes ? "bytes" : "tokens";
  }

  /// Copies the tokens [begin, begin + out.size()).
  /// \throws mics::ArgumentError naming file and position of a token that is not below the
  /// vocabulary
  /// \pre the interval lies within [0, count())
  void read(std::int64_t begin, std::span<Token> out) const;

  /// Reads the interval and keeps nothing: throws as `read`.
  void check(Interval interval) const;

  /// A number that differs if the tokens differ: of all of them up to 2^26, else of 1024
  /// places of 16384 spread evenly, both ends among them.
  [[nodiscard]] std::uint64_t fingerprint() const;

 private:
  struct Piece {
    const std::byte* data = nullptr;
    ElementType type = ElementType::uint8;
    Interval interval;  // its positions in the sequence
    std::string name;   // of the file
  };
  void add(const std::filesystem::path& path, FileBytes file);
  void append(const std::byte* data, ElementType type, std::int64_t count, std::string name);

  SequenceOptions options_;
  std::vector<std::filesystem::path> files_;
  std::vector<FileBytes> contents_;
  std::vector<Token> memory_;
  std::vector<Piece> pieces_;
  std::int64_t count_ = 0;
};

}  // namespace data
