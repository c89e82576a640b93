// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/error.hpp>

#include <CLI/CLI.hpp>

#include <charconv>
#include <cstdint>
#include <limits>
#include <string>

namespace mics::apps {

/// More than any machine has: numbers of ranks on a command line are refused beyond.
inline constexpr std::int64_t most_ranks = 1 << 20;

/// Checks that an option's word is an integer from `least` to `most`.
inline CLI::Validator whole_number(std::int64_t least,
                                   std::int64_t most = std::numeric_limits<std::int64_t>::max()) {
  const auto check = [least, most](const std::string& word) -> std::string {
    std::int64_t number = 0;
    const char* const last = word.data() + word.size();
    const auto [end, error] = std::from_chars(word.data(), last, number);
    if (error == std::errc() && end == last && number >= least && number <= most) return {};
    std::string range = "expected an integer of at least " + std::to_string(least);
    if (most != std::numeric_limits<std::int64_t>::max()) {
      range += " and at most " + std::to_string(most);
    }
    return range + ", found " + in_quotes(word);
  };
  return {check, "INT >= " + std::to_string(least), "whole_number"};
}

}  // namespace mics::apps
