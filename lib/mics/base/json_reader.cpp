// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/json_reader.hpp>

#include <nlohmann/json.hpp>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <source_location>
#include <utility>

namespace mics {
namespace {

using Json = nlohmann::json;

[[noreturn]] void refuse(const std::string& object, const std::string& expected,
                         const std::string& found, const std::string& remedy = {},
                         std::source_location where = std::source_location::current()) {
  raise<ConfigError>({.object = object, .expected = expected, .found = found, .remedy = remedy},
                     where);
}

// Number of insertions, deletions, substitutions and swaps of neighbours between two words.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> cost(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) {
    for (std::size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        cost[i][j] = i + j;
        continue;
      }
      const std::size_t replace = a[i - 1] == b[j - 1] ? 0 : 1;
      cost[i][j] = std::min({cost[i - 1][j] + 1, cost[i][j - 1] + 1, cost[i - 1][j - 1] + replace});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        cost[i][j] = std::min(cost[i][j], cost[i - 2][j - 2] + 1);
      }
    }
  }
  return cost[a.size()][b.size()];
}

// Cuts a text in UTF-8 that is longer than `longest` bytes, not within a character.
std::string cut(std::string text, std::size_t longest) {
  if (text.size() <= longest) return text;
  while (longest > 0 && (static_cast<unsigned char>(text[longest]) & 0xC0U) == 0x80U) --longest;
  return text.substr(0, longest) + "...";
}

constexpr std::size_t longest_shown = 60;

std::string short_text(const Json& value) {
  return cut(value.dump(-1, ' ', false, Json::error_handler_t::replace), longest_shown);
}

// A key as it prints on one line.
std::string printable(const std::string& key) {
  const std::string text = Json(key).dump(-1, ' ', false, Json::error_handler_t::replace);
  return cut(text.substr(1, text.size() - 2), longest_shown);
}

bool is_utf8(const Json& value) {
  try {
    static_cast<void>(value.dump());
    return true;
  } catch (const Json::exception&) {
    return false;
  }
}

// Text from a command line may be anything; JSON text is UTF-8.
void require_utf8(const Json& value, const std::string& where) {
  if (!is_utf8(value)) refuse(where, "text in UTF-8", "other bytes");
}

// What the parser says, without its own prefix and without bytes that do not print.
std::string reason_of(const Json::parse_error& error) {
  std::string reason = error.what();
  if (const auto prefix = reason.find("] "); prefix != std::string::npos) {
    reason = reason.substr(prefix + 2);
  }
  if (const auto colon = reason.find(": "); colon != std::string::npos) {
    reason = reason.substr(colon + 2);
  }
  for (char& c : reason) {
    if (c < ' ' || c > '~') c = '?';
  }
  constexpr std::size_t longest = 160;
  if (reason.size() > longest) reason = reason.substr(0, longest) + "...";
  return reason;
}

// Levels of nesting; what walks a value recursively stays far from the end of the stack.
constexpr int deepest = 64;

[[noreturn]] void refuse_depth(const std::string& source) {
  refuse(source, "at most " + std::to_string(deepest) + " levels of nesting", "more");
}

std::string at_line(const std::string& source, std::string_view text, std::size_t byte) {
  const auto end = text.begin() + static_cast<std::ptrdiff_t>(std::min(byte, text.size()));
  return source + ':' + std::to_string(std::count(text.begin(), end, '\n') + 1);
}

// A value that lies `levels` below the root. nlohmann keeps the last of duplicate keys; a deck with
// two values for one key is a mistake.
Json parse_value(std::string_view text, const std::string& source, int levels) {
  std::vector<std::set<std::string>> keys;
  std::string duplicate;
  const Json::parser_callback_t watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth + levels > deepest) refuse_depth(source);
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key &&
        !keys.back().insert(parsed.get<std::string>()).second && duplicate.empty()) {
      duplicate = parsed.get<std::string>();
    }
    return true;
  };
  Json json = Json::parse(text.begin(), text.end(), watch, true, true);
  if (!duplicate.empty()) {
    refuse(source, "each key once", "two values of " + in_quotes(printable(duplicate)));
  }
  return json;
}

Json parse_text(std::string_view text, const std::string& source) {
  // The parser takes a zero byte for the end of the text.
  if (const std::size_t zero = text.find('\0'); zero != std::string_view::npos) {
    refuse(at_line(source, text, zero), "valid JSON", "a zero byte");
  }
  Json json;
  try {
    json = parse_value(text, source, 0);
  } catch (const Json::parse_error& error) {
    // The parser stops behind what it could not read; a newline there belongs to the line before.
    const std::size_t last = text.find_last_not_of(" \t\r\n") + 1;
    const std::size_t read = std::min(error.byte == 0 ? 0 : error.byte - 1, last);
    refuse(at_line(source, text, read), "valid JSON", reason_of(error));
  } catch (const Json::out_of_range& error) {
    refuse(source, "numbers in the range of fp64", in_quotes(cut(error.what(), 160)));
  }
  if (!json.is_object()) refuse(source, "a JSON object", short_text(json));
  return json;
}

void apply_override(Json& root, const std::string& text, const std::string& source) {
  const auto equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    refuse("argument " + in_quotes(printable(text)), "key.inner=value", "no key or no \"=\"");
  }
  Json* node = &root;
  const std::string path = text.substr(0, equals);
  std::size_t begin = 0;
  int levels = 0;
  while (true) {
    if (++levels > deepest) refuse_depth(source);
    const auto dot = path.find('.', begin);
    const std::string key = path.substr(begin, dot - begin);
    if (!node->is_object()) {
      refuse(source, "an object to hold " + in_quotes(printable(path)), short_text(*node));
    }
    node = &(*node)[key];
    if (dot == std::string::npos) break;
    if (node->is_null()) *node = Json::object();
    begin = dot + 1;
  }
  // What is no JSON, or a number beyond fp64, is a string.
  const std::string value = text.substr(equals + 1);
  *node = Json(value);
  try {
    if (value.find('\0') == std::string::npos) *node = parse_value(value, source, levels);
  } catch (const Json::exception&) {
    return;
  }
}

}  // namespace

bool is_utf8(std::string_view text) { return is_utf8(Json(text)); }

struct JsonReader::Impl {
  Json value;
  std::string source;
  std::string path;
  std::set<std::string> asked;

  const Json* find(const std::string& key) {
    asked.insert(key);
    const auto found = value.find(key);
    return found == value.end() || found->is_null() ? nullptr : &*found;
  }
  [[nodiscard]] std::string where(const std::string& key) const {
    return source + ": " + (path.empty() ? "" : path + '.') + printable(key);
  }
  const Json* find_or_require(const std::string& key, bool required, const std::string& kind) {
    const Json* found = find(key);
    if (found == nullptr && required) refuse(where(key), kind, "nothing", "add the key");
    return found;
  }
};

JsonReader::JsonReader(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
JsonReader::JsonReader(JsonReader&&) noexcept = default;
JsonReader& JsonReader::operator=(JsonReader&&) noexcept = default;
JsonReader::~JsonReader() = default;

JsonReader JsonReader::parse(std::string_view text, std::string_view source,
                             std::span<const std::string> overrides) {
  auto impl = std::make_unique<Impl>();
  impl->source = source;
  impl->value = parse_text(text, impl->source);
  for (const std::string& text_of : overrides) apply_override(impl->value, text_of, impl->source);
  return JsonReader(std::move(impl));
}

JsonReader JsonReader::parse_file(const std::string& path, std::span<const std::string> overrides) {
  std::error_code error;
  if (std::filesystem::exists(path, error) && !std::filesystem::is_regular_file(path, error)) {
    refuse(path, "a file that can be read",
           std::filesystem::is_directory(path, error) ? "a folder" : "something else");
  }
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file.is_open() || file.bad()) {
    refuse(path, "a file that can be read", "none", "check the path");
  }
  if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
    refuse(path, "a JSON object", "an empty file");
  }
  return parse(text, path, overrides);
}

std::string JsonReader::where(const std::string& key) const { return impl_->where(key); }
std::string JsonReader::dump() const {
  return impl_->value.dump(-1, ' ', false, Json::error_handler_t::replace);
}
std::vector<std::string> JsonReader::keys() const {
  std::vector<std::string> result;
  for (const auto& [key, value] : impl_->value.items()) result.push_back(key);
  return result;
}

std::string JsonReader::shown(const std::string& key) const {
  const auto found = impl_->value.find(key);
  return found == impl_->value.end() ? "null" : short_text(*found);
}

bool JsonReader::is_object(const std::string& key) {
  const Json* value = impl_->find(key);
  return value != nullptr && value->is_object();
}

bool JsonReader::has(const std::string& key) { return impl_->find(key) != nullptr; }

bool JsonReader::is_auto(const std::string& key) {
  const Json* value = impl_->find(key);
  return value != nullptr && value->is_string() && *value == "auto";
}

double JsonReader::number(const std::string& key, std::optional<double> fallback) {
  const Json* value = impl_->find_or_require(key, !fallback, "a number");
  if (value == nullptr) return *fallback;
  if (!value->is_number() || !std::isfinite(value->get<double>())) {
    refuse(where(key), "a finite number", short_text(*value));
  }
  return value->get<double>();
}

std::int64_t JsonReader::integer(const std::string& key, std::optional<std::int64_t> fallback,
                                 std::int64_t lowest, std::int64_t highest) {
  const Json* value = impl_->find_or_require(key, !fallback, "an integer");
  if (value == nullptr) return *fallback;
  std::optional<std::int64_t> result;
  if (value->is_number_unsigned()) {
    if (value->get<std::uint64_t>() <= static_cast<std::uint64_t>(INT64_MAX)) {
      result = value->get<std::int64_t>();
    }
  } else if (value->is_number_integer()) {
    result = value->get<std::int64_t>();
  } else if (value->is_number_float()) {
    const double real = value->get<double>();
    // Up to 2^53 an fp64 names one integer.
    if (std::abs(real) <= 0x1p53 && real == std::floor(real)) {
      result = static_cast<std::int64_t>(real);
    }
  }
  if (!result) refuse(where(key), "an integer", short_text(*value));
  if (*result < lowest || *result > highest) {
    std::string range = "an integer of at least " + std::to_string(lowest);
    if (highest != INT64_MAX) range += " and at most " + std::to_string(highest);
    refuse(where(key), range, short_text(*value));
  }
  return *result;
}

bool JsonReader::boolean(const std::string& key, std::optional<bool> fallback) {
  const Json* value = impl_->find_or_require(key, !fallback, "true or false");
  if (value == nullptr) return *fallback;
  if (!value->is_boolean()) refuse(where(key), "true or false", short_text(*value));
  return value->get<bool>();
}

std::string JsonReader::text(const std::string& key, std::optional<std::string> fallback) {
  const Json* value = impl_->find_or_require(key, !fallback, "a string");
  if (value == nullptr) return *fallback;
  if (!value->is_string()) refuse(where(key), "a string", short_text(*value));
  require_utf8(*value, where(key));
  return value->get<std::string>();
}

std::vector<double> JsonReader::numbers(const std::string& key) {
  const Json* value = impl_->find(key);
  if (value == nullptr) return {};
  std::vector<double> result;
  const auto is_number = [](const Json& entry) { return entry.is_number(); };
  if (!value->is_array() || !std::all_of(value->begin(), value->end(), is_number)) {
    refuse(where(key), "an array of numbers", short_text(*value));
  }
  for (const Json& entry : *value) result.push_back(entry.get<double>());
  return result;
}

std::vector<std::string> JsonReader::texts(const std::string& key) {
  const Json* value = impl_->find(key);
  if (value == nullptr) return {};
  require_utf8(*value, where(key));
  if (value->is_string()) return {value->get<std::string>()};
  const auto is_string = [](const Json& entry) { return entry.is_string(); };
  if (!value->is_array() || !std::all_of(value->begin(), value->end(), is_string)) {
    refuse(where(key), "a string or an array of strings", short_text(*value));
  }
  return value->get<std::vector<std::string>>();
}

JsonReader JsonReader::object(const std::string& key) {
  const Json* value = impl_->find(key);
  if (value != nullptr && !value->is_object()) refuse(where(key), "an object", short_text(*value));
  auto inner = std::make_unique<Impl>();
  inner->source = impl_->source;
  inner->path = (impl_->path.empty() ? "" : impl_->path + '.') + printable(key);
  inner->value = value == nullptr ? Json::object() : *value;
  return JsonReader(std::move(inner));
}

std::vector<std::string> JsonReader::unknown_keys() const {
  std::vector<std::string> result;
  for (const auto& [key, value] : impl_->value.items()) {
    if (!impl_->asked.contains(key)) result.push_back(key);
  }
  return result;
}

std::string JsonReader::remedy_for(const std::string& key) const {
  constexpr std::size_t longest_word = 64;
  std::string nearest;
  std::size_t distance = std::max<std::size_t>(2, key.size() / 3) + 1;
  for (const std::string& candidate : impl_->asked) {
    if (key.size() > longest_word) break;
    const std::size_t d = edit_distance(key, candidate);
    if (d < distance) {
      distance = d;
      nearest = candidate;
    }
  }
  return nearest.empty() ? "remove it" : "did you mean " + in_quotes(nearest) + "?";
}

void JsonReader::finish() const {
  for (const std::string& key : unknown_keys()) {
    refuse(where(key), "a known key", in_quotes(printable(key)), remedy_for(key));
  }
}

}  // namespace mics
