// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/hash.hpp>

#include <data/token_sequence.hpp>

#include <algorithm>
#include <bit>
#include <cstring>
#include <system_error>
#include <utility>

namespace data {

namespace fs = std::filesystem;

namespace {

static_assert(std::endian::native == std::endian::little,
              "files of tokens are little endian and are read as they are");

constexpr std::size_t binary_probe_bytes = 8000;  // git's buffer_is_binary
constexpr std::int64_t most_hashed = std::int64_t{1} << 26;
constexpr std::int64_t hashed_places = 1024;
constexpr std::int64_t hashed_place = 16384;           // tokens
constexpr std::int64_t chunk = std::int64_t{1} << 16;  // tokens of a buffer

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

bool is_binary(std::span<const std::byte> content) {
  const auto probe = content.first(std::min(content.size(), binary_probe_bytes));
  return std::ranges::find(probe, std::byte{0}) != probe.end();
}

/// Regular files below a folder, sorted by path.
std::vector<fs::path> files_below(const fs::path& folder) {
  std::vector<fs::path> result;
  std::error_code error;
  fs::recursive_directory_iterator entry(folder, error);
  for (const fs::recursive_directory_iterator end; !error && entry != end; entry.increment(error)) {
    const auto kind = entry->symlink_status().type();
    if (is_hidden(entry->path())) {
      if (kind == fs::file_type::directory) entry.disable_recursion_pending();
    } else if (kind == fs::file_type::regular) {
      result.push_back(entry->path());
    }
  }
  if (error) {
    mics::raise<mics::ArgumentError>({.object = folder.string(),
                                      .expected = "a readable folder",
                                      .found = error.message(),
                                      .remedy = "check its permissions"});
  }
  std::ranges::sort(result, {}, [](const fs::path& path) { return path.generic_string(); });
  return result;
}

/// True if a folder stands for this file among others.
bool is_wanted(TokenFormat format, const fs::path& path) {
  if (format == TokenFormat::bytes) return true;
  return path.extension() == (format == TokenFormat::npy ? ".npy" : ".bin");
}

/// Copies elements of type T; returns the position of the first that is no token, or out.size().
template <class T>
std::size_t convert(const std::byte* data, std::int64_t begin, std::uint64_t vocabulary,
                    std::span<Token> out) {
  const std::byte* source = data + static_cast<std::size_t>(begin) * sizeof(T);
  bool all_below = true;
  for (std::size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, source + i * sizeof(T), sizeof(T));  // a header may leave it unaligned
    // A negative one becomes larger than every vocabulary.
    all_below &= static_cast<std::uint64_t>(value) < vocabulary;
    out[i] = static_cast<Token>(value);
  }
  if (all_below) return out.size();
  for (std::size_t i = 0;; ++i) {
    T value;
    std::memcpy(&value, source + i * sizeof(T), sizeof(T));
    if (static_cast<std::uint64_t>(value) >= vocabulary) return i;
  }
}

template <class F>
auto with_type(ElementType type, F&& f) {
  switch (type) {
    case ElementType::uint8:
      return f(std::uint8_t{});
    case ElementType::uint16:
      return f(std::uint16_t{});
    case ElementType::uint32:
      return f(std::uint32_t{});
    case ElementType::int32:
      return f(std::int32_t{});
    case ElementType::int64:
      break;
  }
  return f(std::int64_t{});
}

}  // namespace

std::string name(TokenFormat format) {
  switch (format) {
    case TokenFormat::bytes:
      return "bytes";
    case TokenFormat::uint16:
      return "uint16";
    case TokenFormat::uint32:
      return "uint32";
    case TokenFormat::npy:
      break;
  }
  return "npy";
}

TokenSequence::TokenSequence(const std::vector<fs::path>& inputs, const SequenceOptions& options)
    : options_(options) {
  if (inputs.empty()) {
    mics::raise<mics::ArgumentError>({.object = "inputs",
                                      .expected = "at least one file or folder",
                                      .found = "none",
                                      .remedy = "name the text to read"});
  }
  const bool is_text = options.format == TokenFormat::bytes;
  for (const fs::path& input : inputs) {
    std::error_code error;
    const auto status = fs::status(input, error);
    if (!fs::exists(status)) {
      mics::raise<mics::ArgumentError>({.object = input.string(),
                                        .expected = "a file or folder",
                                        .found = "nothing there",
                                        .remedy = "check the path"});
    }
    const bool is_folder = fs::is_directory(status);
    if (!is_folder && !fs::is_regular_file(status)) {
      mics::raise<mics::ArgumentError>({.object = input.string(),
                                        .expected = "a regular file or a folder",
                                        .found = "something that may never end",
                                        .remedy = "name other files"});
    }
    const std::int64_t before = count_;
    for (const fs::path& path : is_folder ? files_below(input) : std::vector{input}) {
      if (is_folder && !is_wanted(options.format, path)) continue;
      FileBytes file(path);
      if (is_folder && is_text && is_binary(file.bytes())) continue;
      add(path, std::move(file));
    }
    if (count_ == before) {
      const std::string kind = is_text ? "text" : name(options.format);
      mics::raise<mics::ArgumentError>(
          {.object = input.string(),
           .expected = is_text ? "text" : "tokens",
           .found = is_folder ? "no " + kind + " file below it" : "an empty file",
           .remedy = "name other files or remove it"});
    }
  }
}

TokenSequence::TokenSequence(std::vector<Token> tokens, const SequenceOptions& options)
    : options_(options), memory_(std::move(tokens)) {
  append(reinterpret_cast<const std::byte*>(memory_.data()), ElementType::uint32,
         static_cast<std::int64_t>(memory_.size()), "tokens in memory");
}

void TokenSequence::add(const fs::path& path, FileBytes file) {
  const auto bytes = static_cast<std::int64_t>(file.bytes().size());
  NpyArray array;
  switch (options_.format) {
    case TokenFormat::bytes:
      array = {ElementType::uint8, bytes, 0};
      break;
    case TokenFormat::uint16:
      array = {ElementType::uint16, bytes / 2, 0};
      break;
    case TokenFormat::uint32:
      array = {ElementType::uint32, bytes / 4, 0};
      break;
    case TokenFormat::npy:
      array = read_npy_header(file.bytes(), path.string());
      break;
  }
  const auto size = static_cast<std::int64_t>(size_of(array.type));
  if (static_cast<std::int64_t>(array.offset) + array.count * size != bytes) {
    mics::raise<mics::ArgumentError>(
        {.object = path.string(),
         .expected = "a multiple of " + std::to_string(size) + " bytes",
         .found = std::to_string(bytes),
         .remedy = "the file was cut, or data.format is another"});
  }
  // What a vector of files holds stays where it is when the vector grows.
  contents_.push_back(std::move(file));
  append(contents_.back().bytes().data() + array.offset, array.type, array.count, path.string());
  files_.push_back(path);
}

void TokenSequence::append(const std::byte* data, ElementType type, std::int64_t count,
                           std::string name) {
  if (count == 0) return;
  pieces_.push_back({data, type, {count_, count}, std::move(name)});
  count_ += count;
}

void TokenSequence::read(std::int64_t begin, std::span<Token> out) const {
  if (out.empty()) return;
  auto piece = std::ranges::upper_bound(pieces_, begin, {},
                                        [](const Piece& p) { return p.interval.offset; }) -
               1;
  while (!out.empty()) {
    const std::int64_t within = begin - piece->interval.offset;
    const auto length = static_cast<std::size_t>(
        std::min(static_cast<std::int64_t>(out.size()), piece->interval.length - within));
    with_type(piece->type, [&](auto tag) {
      using T = decltype(tag);
      const auto vocabulary = static_cast<std::uint64_t>(options_.vocabulary);
      const std::size_t bad = convert<T>(piece->data, within, vocabulary, out.first(length));
      if (bad == length) return;
      T value;
      std::memcpy(&value, piece->data + (static_cast<std::size_t>(within) + bad) * sizeof(T),
                  sizeof(T));
      mics::raise<mics::ArgumentError>(
          {.object = piece->name + ": element " + std::to_string(within + std::int64_t(bad)),
           .expected = "a token below the vocabulary of " + std::to_string(options_.vocabulary),
           .found = std::to_string(value),
           .remedy = "raise model.vocabulary, or correct data.format"});
    });
    out = out.subspan(length);
    begin += static_cast<std::int64_t>(length);
    ++piece;
  }
}

void TokenSequence::check(Interval interval) const {
  std::vector<Token> buffer(static_cast<std::size_t>(std::min(interval.length, chunk)));
  for (std::int64_t begin = interval.offset; begin < interval.end(); begin += chunk) {
    const auto length = static_cast<std::size_t>(std::min(chunk, interval.end() - begin));
    read(begin, std::span(buffer).first(length));
  }
}

std::uint64_t TokenSequence::fingerprint() const {
  const bool is_whole = count_ <= most_hashed;
  const std::int64_t places = is_whole ? (count_ + chunk - 1) / chunk : hashed_places;
  const std::int64_t length = is_whole ? chunk : hashed_place;
  std::vector<Token> buffer(static_cast<std::size_t>(length));
  std::uint64_t hash = mics::hash_combine(0, static_cast<std::uint64_t>(count_));
  for (std::int64_t place = 0; place < places; ++place) {
    // The gaps between places are the same but for rounding, without a product beyond 64 bits.
    const std::int64_t begin =
        is_whole ? place * chunk
                 : static_cast<std::int64_t>(static_cast<long double>(count_ - length) *
                                             static_cast<long double>(place) /
                                             static_cast<long double>(places - 1));
    const auto tokens =
        std::span(buffer).first(static_cast<std::size_t>(std::min(length, count_ - begin)));
    read(begin, tokens);
    for (const Token token : tokens) hash = mics::hash_combine(hash, token);
  }
  return hash;
}

}  // namespace data
