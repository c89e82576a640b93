// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/error.hpp>
#include <mics/engine/detail/config_reader.hpp>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstdint>
#include <optional>
#include <source_location>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

// What the readers of all sections share.

namespace mics::detail {

[[noreturn]] inline void refuse(const std::string& object, const std::string& expected,
                                const std::string& found, const std::string& remedy = {},
                                std::source_location where = std::source_location::current()) {
  raise<ConfigError>({.object = object, .expected = expected, .found = found, .remedy = remedy},
                     where);
}

// The shortest text that reads as the same number.
inline std::string text_of(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}
inline std::string text_of(std::int64_t value) { return std::to_string(value); }
inline std::string text_of(bool value) { return value ? "true" : "false"; }
inline std::string text_of(const std::array<double, 2>& value) {
  return text_of(value[0]) + ", " + text_of(value[1]);
}

// A key and the reason why nothing here depends on it.
struct Idle {
  std::string_view key;
  std::string_view reason;
};

// A file with more keys that are none is something else; its first ones say enough.
inline constexpr std::size_t most_unknown = 1000;

// One object of the file. Every key that it holds becomes one note, or one for each key within.
class Section {
 public:
  Section(JsonReader json, ReadConfig& result) : json_(std::move(json)), result_(&result) {}

  [[nodiscard]] JsonReader& json() { return json_; }
  [[nodiscard]] std::string where(const std::string& key) const { return json_.where(key); }

  void note(const std::string& key, KeyFate fate, std::string text) {
    result_->config.report.keys.push_back({full(key), json_.shown(key), fate, std::move(text)});
  }

  // If the key is there: `read` takes the value and says as what; what it throws is a refusal.
  template <class Read>
  void honour(const std::string& key, Read&& read) {
    if (!json_.has(key)) return;
    guard(key, [&] { note(key, KeyFate::honoured, read()); });
  }

  // A value of its own, or the one that "auto" stands for: the deck's or, as it is, the default.
  // `meaning` stands behind the key for people.
  template <class T, class Get>
  void value(const std::string& key, T& field, const std::optional<T>& deck,
             const std::string& meaning, Get&& get) {
    honour(key, [&] {
      if (!json_.is_auto(key)) {
        field = get();
        return meaning;
      }
      if (deck) field = *deck;
      return meaning + ": " + text_of(field) + (deck ? ", the deck's" : ", the default");
    });
  }
  void number(const std::string& key, double& field, const std::string& meaning,
              const std::optional<double>& deck = {}) {
    value(key, field, deck, meaning, [&] { return json_.number(key); });
  }
  void boolean(const std::string& key, bool& field, const std::string& meaning,
               const std::optional<bool>& deck = {}) {
    value(key, field, deck, meaning, [&] { return json_.boolean(key); });
    KeyNote* noted = find(key);
    if (noted != nullptr && noted->value == "false" && noted->fate == KeyFate::honoured) {
      noted->text += ": no";
    }
  }
  void integer(const std::string& key, std::int64_t& field, const std::string& meaning,
               std::int64_t lowest, std::int64_t highest,
               const std::optional<std::int64_t>& deck = {}) {
    value(key, field, deck, meaning, [&] { return json_.integer(key, {}, lowest, highest); });
  }

  template <class Read>
  void section(const std::string& key, Read&& read) {
    if (json_.has(key)) nested(key, read);
  }
  // `section`, and an empty one where the key is not there.
  template <class Read>
  void nested(const std::string& key, Read&& read) {
    guard(key, [&] {
      Section inner(json_.object(key), *result_);
      if (json_.has(key) && inner.json_.keys().empty()) {
        note(key, KeyFate::honoured, "empty: the defaults");
      }
      read(inner);
      inner.finish();
    });
  }

  // The key, or each key of the object that stands there.
  void without_effect(const std::string& key, const std::string& reason) {
    if (!json_.has(key)) return;
    if (json_.is_object(key)) {
      Section inner(json_.object(key), *result_);
      const std::vector<std::string> keys = inner.json_.keys();
      for (const std::string& name : keys) inner.note(name, KeyFate::without_effect, reason);
      if (!keys.empty()) return;
    }
    note(key, KeyFate::without_effect, reason);
  }
  void without_effect(std::span<const Idle> table) {
    for (const Idle& idle : table) without_effect(std::string(idle.key), std::string(idle.reason));
  }
  // Keys that were not asked for so far.
  void rest_without_effect(const std::string& reason) {
    for (const std::string& key : json_.unknown_keys()) without_effect(key, reason);
  }

  // A switch of something that mics does not do and that would change the numbers.
  void must_be_off(const std::string& key, const std::string& remedy) {
    honour(key, [&]() -> std::string {
      if (!json_.is_auto(key) && json_.boolean(key)) refuse(where(key), "false", "true", remedy);
      return "off, as ever here";
    });
  }
  // A section of something that mics does not do and that would change the numbers.
  void must_be_disabled(const std::string& key, const std::string& remedy) {
    if (!json_.has(key)) return;
    guard(key, [&] {
      Section inner(json_.object(key), *result_);
      const bool has_switch = inner.json_.has("enabled");
      const bool enabled = has_switch
                               ? !inner.json_.is_auto("enabled") && inner.json_.boolean("enabled")
                               : inner.json_.dump().find("\"enabled\":true") != std::string::npos;
      if (!enabled) {
        without_effect(key, "it is not enabled");
        return;
      }
      Section& holder = has_switch ? inner : *this;
      const std::string name = has_switch ? "enabled" : key;
      holder.guard(name, [&] { refuse(holder.where(name), "nothing enabled", "true", remedy); });
      inner.rest_without_effect("it belongs to what is refused");
    });
  }

  // Nothing is ignored: what nobody asked for is refused, null is no value.
  void finish() {
    const std::vector<std::string> unknown = json_.unknown_keys();
    for (std::size_t i = 0; i < unknown.size(); ++i) {
      const std::string& key = unknown[i];
      const std::string others = std::to_string(unknown.size() - i) + " keys that are none";
      const bool stops = i == most_unknown && i + 1 < unknown.size();
      guard(key, [&] {
        refuse(where(key), stops ? "known keys" : "a known key",
               stops ? others : in_quotes(name_of(key)),
               stops ? "this is no configuration" : json_.remedy_for(key));
      });
      if (stops) break;
    }
    for (const std::string& key : json_.keys()) {
      if (!json_.has(key) && find(key) == nullptr) note(key, KeyFate::honoured, "no value");
    }
  }

  template <class Read>
  void guard(const std::string& key, Read&& read) {
    try {
      read();
    } catch (const ConfigError& error) {
      const std::string what = error.what();
      const std::string object = where(key);
      const auto at = what.find(object);
      std::string text = at == std::string::npos ? what : what.substr(at + object.size());
      if (text.starts_with(": ")) text = text.substr(2);
      if (KeyNote* noted = find(key)) {
        noted->fate = KeyFate::refused;
        noted->text = text;
      } else {
        note(key, KeyFate::refused, text);
      }
      result_->refusals.push_back(what);
    }
  }

 private:
  [[nodiscard]] std::string full(const std::string& key) const {
    return where(key).substr(result_->config.source.size());
  }
  [[nodiscard]] std::string name_of(const std::string& key) const {
    const std::string path = where({});
    return where(key).substr(path.size());
  }
  [[nodiscard]] KeyNote* find(const std::string& key) {
    auto& notes = result_->config.report.keys;
    const auto note = std::find_if(notes.begin(), notes.end(),
                                   [name = full(key)](const KeyNote& n) { return n.key == name; });
    return note == notes.end() ? nullptr : &*note;
  }

  JsonReader json_;
  ReadConfig* result_;
};

// The deck's value of a key, if its engine section gives one.
class Deck {
 public:
  explicit Deck(const DeckValues& values) : values_(values) {}

  [[nodiscard]] const DeckValues& values() const { return values_; }
  template <class Get>
  [[nodiscard]] auto of(std::string_view key, Get&& get) const
      -> std::optional<std::decay_t<decltype(get(std::declval<const Config&>()))>> {
    if (!values_.engine || !values_.engine->report.gives(key)) return {};
    return get(*values_.engine);
  }

 private:
  const DeckValues& values_;
};

inline std::string lower_case(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

inline constexpr std::int64_t most_steps = 1'000'000'000'000'000;

// The sections, each in the file of its subject.
void read_optimizer(Section& section, Config& config, const Deck& deck);
void read_schedule(Section& section, Config& config, const Deck& deck);
void read_zero(Section& zero, Config& config, const Deck& deck);

}  // namespace mics::detail
