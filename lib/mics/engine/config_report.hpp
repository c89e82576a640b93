// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

namespace mics {

/// What becomes of a key of a configuration.
enum class KeyFate : std::uint8_t {
  honoured,        ///< it decides something, or asks for what mics does anyway
  without_effect,  ///< nothing here depends on it, and no number changes
  refused,         ///< it cannot be had, or is wrong
};

/// One key of a configuration and what is made of it.
struct KeyNote {
  std::string key;    ///< in full, below the configuration's own object: `bf16.enabled`
  std::string value;  ///< as JSON on one line, cut where it is long
  KeyFate fate = KeyFate::honoured;
  std::string text;  ///< as what; why not; or expected, found and remedy
};

/// A key that the configuration leaves out and whose default is no matter of course: it differs
/// between releases of DeepSpeed, or from them.
struct DefaultNote {
  std::string key;
  std::string taken;      ///< what holds here
  std::string elsewhere;  ///< DeepSpeed's defaults
};

/// Every key of a configuration with what is made of it, and the defaults that a user of DeepSpeed
/// might expect otherwise.
struct ConfigReport {
  std::vector<KeyNote> keys;
  std::vector<DefaultNote> defaults;

  [[nodiscard]] std::vector<KeyNote> with(KeyFate fate) const {
    std::vector<KeyNote> result;
    std::copy_if(keys.begin(), keys.end(), std::back_inserter(result),
                 [fate](const KeyNote& note) { return note.fate == fate; });
    return result;
  }
  /// True if nothing is refused.
  [[nodiscard]] bool usable() const {
    return std::none_of(keys.begin(), keys.end(),
                        [](const KeyNote& note) { return note.fate == KeyFate::refused; });
  }
  /// True if the configuration holds a value of its own for `key`: honoured, and not "auto".
  [[nodiscard]] bool gives(std::string_view key) const {
    return std::any_of(keys.begin(), keys.end(), [key](const KeyNote& note) {
      return note.key == key && note.fate == KeyFate::honoured && note.value != "\"auto\"" &&
             note.value != "null";
    });
  }
};

}  // namespace mics
