// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/crc32c.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <optional>
#include <set>

namespace mics::checkpoint {
namespace {

constexpr std::string_view magic = "mics-checkpoint ";

std::uint32_t crc_of(std::string_view text) {
  return crc32c(std::as_bytes(std::span(text.data(), text.size())));
}

template <class T>
std::optional<T> number(std::string_view word, int base = 10) {
  T value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value, base);
  if (error != std::errc() || end != word.data() + word.size() || word.empty()) return {};
  return value;
}

bool is_plain(std::string_view word, std::string_view also) {
  return !word.empty() && word.size() <= 255 && std::all_of(word.begin(), word.end(), [&](char c) {
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           also.find(c) != std::string_view::npos;
  });
}

// Takes a text apart, line by line and word by word.
class Lines {
 public:
  Lines(std::string_view text, std::string_view object) : rest_(text), object_(object) {}

  // The words of the next line, which must begin with `keyword` and have `count` more.
  std::vector<std::string_view> take(std::string_view keyword, std::size_t count) {
    ++number_;
    const auto end = rest_.find('\n');
    if (end == std::string_view::npos) refuse("a line " + in_quotes(keyword), "the end");
    line_ = rest_.substr(0, end);
    rest_.remove_prefix(end + 1);
    std::vector<std::string_view> words;
    for (std::string_view line = line_;;) {
      const auto space = line.find(' ');
      words.push_back(line.substr(0, space));
      if (space == std::string_view::npos) break;
      line.remove_prefix(space + 1);
    }
    if (words.front() != keyword || words.size() != count + 1) {
      refuse(in_quotes(keyword) + " and " + std::to_string(count) + " words", in_quotes(line_));
    }
    words.erase(words.begin());
    return words;
  }
  [[nodiscard]] bool next_is(std::string_view keyword) const { return rest_.starts_with(keyword); }
  [[nodiscard]] std::string_view rest() const { return rest_; }
  [[nodiscard]] std::string_view line() const { return line_; }
  [[noreturn]] void refuse(const std::string& expected, const std::string& found) const {
    raise<FormatError>({.object = std::string(object_) + ", line " + std::to_string(number_),
                        .expected = expected,
                        .found = found});
  }
  template <class T>
  T integer(std::string_view word, int base = 10) const {
    const auto value = number<T>(word, base);
    if (!value) refuse("numbers where numbers belong", in_quotes(line_));
    return *value;
  }

 private:
  std::string_view rest_;
  std::string_view object_;
  std::string_view line_;
  int number_ = 0;
};

// Which release reads a text of another version. Its writer's line is spelled alike in all
// versions.
std::string release_that_reads(std::string_view text, std::int64_t version) {
  if (version < format_version) return "no release has that version: the file is damaged";
  std::string writer;
  constexpr std::string_view line = "\nwriter ";
  if (const auto at = text.find(line); at != std::string_view::npos) {
    const std::string_view rest = text.substr(at + line.size());
    const std::string_view words = rest.substr(0, rest.find('\n'));
    if (is_plain(words, " .+-_")) writer = words;
  }
  if (writer.empty()) return "a later release of mics wrote it and reads it";
  return writer + " wrote it: that release and later ones read it";
}

}  // namespace

std::string hex(std::uint32_t value) {
  std::array<char, 9> text{};
  std::snprintf(text.data(), text.size(), "%08x", value);
  return text.data();
}

std::string to_text(const Commit& commit) {
  std::string text = std::string(magic) + std::to_string(format_version) + '\n';
  text += "step " + std::to_string(commit.step) + '\n';
  text += "save " + commit.id + '\n';
  text += "time " + commit.time + '\n';
  text += "writer " + commit.writer + '\n';
  text += "layout world " + std::to_string(commit.grid.world_size) + " shard " +
          std::to_string(commit.grid.shard_size) + " slices " + std::to_string(commit.grid.slices) +
          " node " + std::to_string(commit.grid.ranks_per_node) + '\n';
  text += "digest " + hex(commit.digest) + '\n';
  for (const CommittedFile& file : commit.files) {
    text += "file " + file.name + ' ' + std::to_string(file.bytes) + ' ' + hex(file.crc) + '\n';
  }
  return text + "end " + hex(crc_of(text)) + '\n';
}

Commit parse_commit(std::string_view text, std::string_view object) {
  // The version first: another one may have another last line.
  if (!text.starts_with(magic)) {
    raise<FormatError>({.object = std::string(object),
                        .expected = "a text that begins with " + in_quotes(magic),
                        .found = in_quotes(text.substr(0, 24)),
                        .remedy = "this is no checkpoint of mics"});
  }
  const auto version_text = text.substr(magic.size(), text.find('\n') - magic.size());
  const auto version = number<std::int64_t>(version_text);
  if (version && *version != format_version) {
    raise<FormatError>({.object = std::string(object),
                        .expected = "format version " + std::to_string(format_version),
                        .found = std::to_string(*version),
                        .remedy = release_that_reads(text, *version)});
  }
  constexpr std::size_t end_line = 4 + 8 + 1;
  const std::string_view body = text.substr(0, text.size() < end_line ? 0 : text.size() - end_line);
  if (text != std::string(body) + "end " + hex(crc_of(body)) + '\n') {
    raise<FormatError>({.object = std::string(object),
                        .expected = "a last line \"end " + hex(crc_of(body)) + "\"",
                        .found = in_quotes(text.substr(body.size())),
                        .remedy = "the file is damaged"});
  }

  Lines lines(body, object);
  Commit commit;
  lines.take("mics-checkpoint", 1);
  commit.step = lines.integer<std::int64_t>(lines.take("step", 1)[0]);
  if (commit.step < 0) lines.refuse("a step", in_quotes(lines.line()));
  commit.id = lines.take("save", 1)[0];
  commit.time = lines.take("time", 1)[0];
  const auto writer = lines.take("writer", 2);
  commit.writer = std::string(writer[0]) + ' ' + std::string(writer[1]);
  const auto grid = lines.take("layout", 8);
  commit.grid = {lines.integer<int>(grid[1]), lines.integer<int>(grid[3]),
                 lines.integer<int>(grid[5]), lines.integer<int>(grid[7])};
  commit.digest = lines.integer<std::uint32_t>(lines.take("digest", 1)[0], 16);
  std::set<std::string_view> names;
  while (lines.next_is("file ")) {
    const auto words = lines.take("file", 3);
    // A name leads nowhere but into the step's own folder.
    if (!is_plain(words[0], "._-") || words[0].front() == '.' || words[0] == commit_name ||
        !names.insert(words[0]).second) {
      lines.refuse("names of files, each once", in_quotes(words[0]));
    }
    commit.files.push_back({std::string(words[0]), lines.integer<std::int64_t>(words[1]),
                            lines.integer<std::uint32_t>(words[2], 16)});
    if (commit.files.back().bytes < 0) lines.refuse("a size", in_quotes(words[1]));
  }
  if (!lines.rest().empty()) lines.refuse("the end", in_quotes(lines.rest().substr(0, 32)));
  // Numbers in another spelling, and words that were not looked at.
  if (to_text(commit) != text) lines.refuse("the spelling of its format", "another");
  return commit;
}

}  // namespace mics::checkpoint
