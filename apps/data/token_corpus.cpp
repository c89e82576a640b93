// SPDX-License-Identifier: Apache-2.0
#include <mics/base/random.hpp>

#include <data/byte_corpus.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <stdexcept>
#include <string>
#include <system_error>

namespace data {

namespace fs = std::filesystem;

namespace {

constexpr std::uint64_t window_stream =
    0x636f72707573;                               // "corpus": apart from streams of parameters
constexpr std::size_t binary_probe_bytes = 8000;  // git's buffer_is_binary
constexpr std::int64_t most_windows_a_block = 16;
constexpr std::int64_t wanted_validation_blocks = 8;

[[noreturn]] void fail(const std::string& object, const std::string& expected,
                       const std::string& found, const std::string& remedy) {
  throw std::runtime_error("data::ByteCorpus: " + object + ": expected " + expected + ", found " +
                           found + "; " + remedy);
}

bool is_hidden(const fs::path& path) { return path.filename().string().starts_with('.'); }

Bytes read_file(const fs::path& path) {
  std::ifstream stream(path, std::ios::binary);
  Bytes content;
  std::error_code error;
  const auto size = fs::file_size(path, error);
  if (!error) content.reserve(size);
  char chunk[1 << 16];
  while (stream) {
    stream.read(chunk, sizeof chunk);
    content.insert(content.end(), chunk, chunk + stream.gcount());
  }
  if (!stream.eof()) {
    fail(path.string(), "a readable file", "an error on opening or reading",
         "check its permissions");
  }
  return content;
}

bool is_binary(const Bytes& content) {
  const auto end =
      content.begin() + static_cast<std::ptrdiff_t>(std::min(content.size(), binary_probe_bytes));
  return std::find(content.begin(), end, 0) != end;
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
    fail(folder.string(), "a readable folder", error.message(), "check its permissions");
  }
  std::ranges::sort(result, {}, [](const fs::path& path) { return path.generic_string(); });
  return result;
}

}  // namespace

ByteCorpus::ByteCorpus(const std::vector<fs::path>& inputs, const CorpusOptions& options)
    : options_(options) {
  if (inputs.empty())
    fail("inputs", "at least one file or folder", "none", "name the text to read");
  for (const fs::path& input : inputs) {
    std::error_code error;
    const auto status = fs::status(input, error);
    if (!fs::exists(status)) {
      fail(input.string(), "a file or folder", "nothing there", "check the path");
    }
    const bool is_folder = fs::is_directory(status);
    if (!is_folder && !fs::is_regular_file(status)) {
      fail(input.string(), "a regular file or a folder", "something that may never end",
           "name other files");
    }
    const std::size_t before = text_.size();
    for (const fs::path& path : is_folder ? files_below(input) : std::vector{input}) {
      const Bytes content = read_file(path);
      if (is_folder && is_binary(content)) continue;
      text_.insert(text_.end(), content.begin(), content.end());
      files_.push_back(path);
    }
    if (text_.size() == before) {
      fail(input.string(), "text", is_folder ? "no text file below it" : "an empty file",
           "name other files or remove it");
    }
  }
  split();
}

ByteCorpus::ByteCorpus(Bytes text, const CorpusOptions& options)
    : options_(options), text_(std::move(text)) {
  split();
}

void ByteCorpus::split() {
  if (options_.positions < 1) {
    fail("positions", "at least 1", std::to_string(options_.positions), "change the deck");
  }
  if (!(options_.validation_fraction > 0 && options_.validation_fraction <= 0.5)) {
    fail("validation fraction", "more than 0 and at most 0.5",
         std::to_string(options_.validation_fraction), "change the deck");
  }
  const std::int64_t window = window_bytes();
  const auto period = static_cast<std::int64_t>(std::llround(1 / options_.validation_fraction));
  if (bytes() < period * window) {
    fail("text", "at least " + std::to_string(period * window) + " bytes", std::to_string(bytes()),
         "give more text, fewer positions, or a larger validation fraction");
  }
  const std::int64_t block =
      window * std::clamp<std::int64_t>(bytes() / (window * period * wanted_validation_blocks), 1,
                                        most_windows_a_block);
  const ByteSpan text(text_);
  const auto piece = [&](std::int64_t begin, std::int64_t end) {
    return text.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
  };
  const auto add_run = [&](std::int64_t begin, std::int64_t end) {
    if (end - begin < window) return;
    runs_.push_back(piece(begin, end));
    starts_.push_back((starts_.empty() ? 0 : starts_.back()) +
                      static_cast<std::uint64_t>(end - begin - window + 1));
  };
  std::int64_t run_begin = 0;
  for (std::int64_t begin = (period - 1) * block; begin + block <= bytes();
       begin += period * block) {
    add_run(run_begin, begin);
    for (std::int64_t w = begin; w < begin + block; w += window)
      windows_.push_back(piece(w, w + window));
    run_begin = begin + block;
  }
  add_run(run_begin, bytes());

  const std::int64_t limit = options_.validation_window_limit;
  const auto count = static_cast<std::int64_t>(windows_.size());
  if (limit > 0 && limit < count) {
    std::vector<ByteSpan> chosen;
    for (std::int64_t i = 0; i < limit; ++i) {
      chosen.push_back(windows_[static_cast<std::size_t>(i * count / limit)]);
    }
    windows_ = std::move(chosen);
  }
}

std::int64_t ByteCorpus::training_bytes() const {
  std::int64_t sum = 0;
  for (const ByteSpan run : runs_) sum += static_cast<std::int64_t>(run.size());
  return sum;
}

ByteSpan ByteCorpus::sample(std::uint64_t global_index) const {
  const auto word = mics::RandomStream{options_.seed, window_stream}.bits(global_index);
  const std::uint64_t random = static_cast<std::uint64_t>(word[0]) << 32 | word[1];
  const std::uint64_t start = random % starts_.back();  // uneven by less than starts / 2^64
  const auto run = static_cast<std::size_t>(
      std::upper_bound(starts_.begin(), starts_.end(), start) - starts_.begin());
  const std::uint64_t within = start - (run == 0 ? 0 : starts_[run - 1]);
  return runs_[run].subspan(within, static_cast<std::size_t>(window_bytes()));
}

}  // namespace data
