// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/engine/config.hpp>

#include <string>
#include <vector>

namespace mics::detail {

/// A configuration as it was read, refusals included.
struct ReadConfig {
  Config config;
  std::vector<std::string> refusals;  ///< the errors that the refused keys raised
};

/// Reads every key of `json`. Throws nothing of its own: what is refused is listed.
[[nodiscard]] ReadConfig read_config(JsonReader json, const DeckValues& deck);

}  // namespace mics::detail
