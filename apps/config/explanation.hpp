// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/engine/config.hpp>

#include <string>

namespace mics::apps {

/// What mics makes of a configuration, as text for people: every key by its fate, the settings that
/// result, and the defaults that a user of DeepSpeed may expect otherwise.
/// \param name  of the file
[[nodiscard]] std::string explanation(const Config& config, const std::string& name);

}  // namespace mics::apps
