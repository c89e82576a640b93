// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mics {

/// Whether JSON, and with it a checkpoint, can hold a text: whether it is UTF-8.
[[nodiscard]] bool is_utf8(std::string_view text);

/// Strict reading of one JSON object: comments are accepted, duplicate keys and more than 64 levels
/// of nesting refused, every value is asked for by key and type, and keys that nobody asked for are
/// errors with a suggestion.
///
///   auto deck = JsonReader::parse_file("deck.json", {"model.width=64"});
///   auto model = deck.object("model");
///   const auto width = model.integer("width", 128);
///   model.finish();
///
/// All functions are local and throw ConfigError, with the file and the full key in the message.
class JsonReader {
 public:
  /// \param source     name of the text in messages
  /// \param overrides  `key.inner=value`, applied in order; a value that is no JSON is a string
  [[nodiscard]] static JsonReader parse(std::string_view text, std::string_view source,
                                        std::span<const std::string> overrides = {});
  /// Reads a file. \throws ConfigError if it is missing or empty
  [[nodiscard]] static JsonReader parse_file(const std::string& path,
                                             std::span<const std::string> overrides = {});

  JsonReader(JsonReader&&) noexcept;
  JsonReader& operator=(JsonReader&&) noexcept;
  ~JsonReader();

  /// True if the key is there and not null. Counts as asked for.
  [[nodiscard]] bool has(const std::string& key);
  /// True if the value is the string "auto". Counts as asked for.
  [[nodiscard]] bool is_auto(const std::string& key);

  /// All keys of the object, sorted, whether asked for or not.
  [[nodiscard]] std::vector<std::string> keys() const;
  /// The value as JSON on one line, cut where it is long: for people. `null` if it is not there.
  [[nodiscard]] std::string shown(const std::string& key) const;
  /// True if the value is an object. Counts as asked for.
  [[nodiscard]] bool is_object(const std::string& key);

  /// The value, or `fallback` if the key is not there; without a fallback the key is required.
  [[nodiscard]] double number(const std::string& key, std::optional<double> fallback = {});
  /// Accepts 5e8 and 24.0 as integers. \throws ConfigError outside [lowest, highest]
  [[nodiscard]] std::int64_t integer(const std::string& key,
                                     std::optional<std::int64_t> fallback = {},
                                     std::int64_t lowest = INT64_MIN,
                                     std::int64_t highest = INT64_MAX);
  [[nodiscard]] bool boolean(const std::string& key, std::optional<bool> fallback = {});
  [[nodiscard]] std::string text(const std::string& key, std::optional<std::string> fallback = {});
  /// An array of numbers; empty if the key is not there.
  [[nodiscard]] std::vector<double> numbers(const std::string& key);
  /// A string or an array of strings; empty if the key is not there.
  [[nodiscard]] std::vector<std::string> texts(const std::string& key);
  /// An object; an empty one if the key is not there.
  [[nodiscard]] JsonReader object(const std::string& key);

  /// Keys that were not asked for, sorted.
  [[nodiscard]] std::vector<std::string> unknown_keys() const;
  /// What the writer of an unknown key can do: names the likeliest meant of those asked for.
  [[nodiscard]] std::string remedy_for(const std::string& key) const;
  /// \throws ConfigError naming the first of `unknown_keys`
  void finish() const;

  /// `source: outer.key`, for messages about a value; one line, whatever the key holds.
  [[nodiscard]] std::string where(const std::string& key) const;
  /// The object as compact JSON text.
  [[nodiscard]] std::string dump() const;

 private:
  struct Impl;
  explicit JsonReader(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace mics
