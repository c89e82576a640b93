// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>

#include <data/npy.hpp>

#include <algorithm>
#include <limits>
#include <optional>
#include <string_view>
#include <vector>

namespace data {
namespace {

constexpr std::string_view magic = "\x93NUMPY";
constexpr std::size_t longest_header = std::size_t{1} << 16;  // one of an array has 128 bytes

[[noreturn]] void refuse(const std::string& name, const std::string& expected,
                         const std::string& found,
                         const std::string& remedy = "save it with numpy.save") {
  mics::raise<mics::ArgumentError>(
      {.object = name, .expected = expected, .found = found, .remedy = remedy});
}

// Text of a header as a message may hold it.
std::string printable(std::string_view text) {
  std::string result(text.substr(0, 80));
  std::ranges::replace_if(
      result, [](unsigned char c) { return c < ' ' || c > '~'; }, '.');
  return result;
}

/// The three entries of a header's dictionary.
struct Entries {
  std::optional<std::string> descr;
  std::optional<bool> fortran_order;
  std::optional<std::vector<std::int64_t>> shape;
};

/// Parses a Python dictionary of a string, a truth value and a tuple of integers.
class HeaderParser {
 public:
  HeaderParser(std::string_view text, const std::string& name) : text_(text), name_(name) {}

  Entries parse() {
    Entries entries;
    take('{');
    while (!next_is('}')) {
      const std::string key = string();
      take(':');
      if (key == "descr" && !entries.descr) {
        if (next_is('[')) {
          refuse(name_, "an array of integers", "an array of records", "save one field of it");
        }
        entries.descr = string();
      } else if (key == "fortran_order" && !entries.fortran_order) {
        entries.fortran_order = truth();
      } else if (key == "shape" && !entries.shape) {
        entries.shape = tuple();
      } else {
        fail();
      }
      if (!next_is('}')) take(',');
    }
    take('}');
    skip_space();
    if (at_ != text_.size() || !entries.descr || !entries.fortran_order || !entries.shape) fail();
    return entries;
  }

 private:
  [[noreturn]] void fail() const {
    refuse(name_, "a header of 'descr', 'fortran_order' and 'shape'", printable(text_));
  }
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  bool next_is(char c) {
    skip_space();
    return at_ < text_.size() && text_[at_] == c;
  }
  void take(char c) {
    if (!next_is(c)) fail();
    ++at_;
  }
  std::string string() {
    const char quote = next_is('"') ? '"' : '\'';
    take(quote);
    const auto end = text_.find(quote, at_);
    if (end == std::string_view::npos) fail();
    std::string result(text_.substr(at_, end - at_));
    at_ = end + 1;
    return result;
  }
  bool truth() {
    skip_space();
    for (const std::string_view word : {"True", "False"}) {
      if (text_.substr(at_).starts_with(word)) {
        at_ += word.size();
        return word == "True";
      }
    }
    fail();
  }
  std::int64_t integer() {
    skip_space();
    const std::size_t begin = at_;
    std::int64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const int digit = text_[at_] - '0';
      if (value > (std::numeric_limits<std::int64_t>::max() - digit) / 10) fail();
      value = 10 * value + digit;
    }
    if (at_ == begin) fail();
    return value;
  }
  std::vector<std::int64_t> tuple() {
    std::vector<std::int64_t> result;
    take('(');
    bool has_comma = false;
    while (!next_is(')')) {
      if (!result.empty() && !has_comma) fail();
      result.push_back(integer());
      has_comma = next_is(',');
      if (has_comma) take(',');
    }
    take(')');
    if (result.size() == 1 && !has_comma) fail();  // (5) is an integer in parentheses
    return result;
  }

  std::string_view text_;
  const std::string& name_;
  std::size_t at_ = 0;
};

ElementType element_type(const std::string& descr, const std::string& name) {
  if (descr == "|u1") return ElementType::uint8;
  if (descr == "<u2") return ElementType::uint16;
  if (descr == "<u4") return ElementType::uint32;
  if (descr == "<i4") return ElementType::int32;
  if (descr == "<i8") return ElementType::int64;
  const bool is_big_endian = descr.starts_with('>');
  refuse(name, "elements |u1, <u2, <u4, <i4 or <i8",
         printable(descr) + (is_big_endian ? " (big endian)" : ""),
         "convert it, for example with .astype('<u2')");
}

}  // namespace

NpyArray read_npy_header(std::span<const std::byte> file, const std::string& name) {
  const std::string_view text(reinterpret_cast<const char*>(file.data()), file.size());
  if (!text.starts_with(magic) || text.size() < magic.size() + 2) {
    refuse(name, "a NumPy array (.npy)", "a file that does not begin as one does");
  }
  const auto byte = [&](std::size_t i) { return std::to_integer<std::size_t>(file[i]); };
  const std::size_t major = byte(magic.size());
  const std::size_t minor = byte(magic.size() + 1);
  if (major < 1 || major > 3 || minor != 0) {
    refuse(name, "format version 1.0, 2.0 or 3.0",
           std::to_string(major) + "." + std::to_string(minor));
  }
  const std::size_t length_bytes = major == 1 ? 2 : 4;
  const std::size_t begin = magic.size() + 2 + length_bytes;
  std::size_t length = 0;
  if (text.size() >= begin) {
    for (std::size_t i = 0; i < length_bytes; ++i) length |= byte(magic.size() + 2 + i) << (8 * i);
  }
  if (text.size() < begin || length > longest_header || length > text.size() - begin) {
    refuse(name, "a header of at most 65536 bytes, all of it in the file",
           std::to_string(length) + " in a file of " + std::to_string(text.size()));
  }
  const Entries entries = HeaderParser(text.substr(begin, length), name).parse();
  NpyArray array;
  array.type = element_type(*entries.descr, name);
  array.offset = begin + length;
  if (entries.shape->size() != 1) {
    refuse(
        name, "one dimension",
        std::to_string(entries.shape->size()) + (*entries.fortran_order ? " in Fortran order" : ""),
        "flatten it with .ravel()");
  }
  array.count = entries.shape->front();
  const std::size_t size = size_of(array.type);
  const std::size_t data = text.size() - array.offset;
  if (data % size != 0 || static_cast<std::uint64_t>(array.count) != data / size) {
    refuse(name,
           std::to_string(array.count) + " elements of " + std::to_string(size) +
               " bytes after the header",
           std::to_string(data) + " bytes", "the file was cut or has grown: save it again");
  }
  return array;
}

}  // namespace data
