// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string_view>

namespace mics {

enum class LogLevel { information, warning };

/// Where the library's messages go. The library itself prints nothing. Called on the caller's
/// thread, with one line without a newline, on the rank that has something to say.
using LogSink = std::function<void(LogLevel, std::string_view)>;

}  // namespace mics
