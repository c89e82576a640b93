// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <functional>
#include <string_view>

namespace mics {

enum class LogLevel {
  information,
  warning,
  trace,  ///< many lines: what this rank did before it failed
  stuck,  ///< a call of MPI did not return in time and never may; from a thread of its own
};

/// Where the library's messages go. The library itself prints nothing. Called on the rank that has
/// something to say, on the caller's thread except for `stuck`, with one line without a newline
/// except for `trace`. On `stuck` an application can only end the process.
using LogSink = std::function<void(LogLevel, std::string_view)>;

}  // namespace mics
