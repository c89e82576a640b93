// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>

namespace report {

enum class MetricsMode : std::uint8_t { replace, append };

/// Writes one JSON object a line, each flushed: a file that is read while the run goes on, and
/// complete up to a kill.
///
/// A run must not die of a full disk under its log: the first failure is told to `on_error`, and
/// nothing is written after it. Numbers that are not finite become null, text that is not UTF-8
/// gets replacement characters.
class MetricsWriter {
 public:
  using ErrorHandler = std::function<void(const std::string& message)>;

  /// \param[in] path      its folder is made if it is missing; empty: nothing is ever written
  /// \param[in] mode      append after a restart
  /// \param[in] on_error  called at most once, with one line of text
  MetricsWriter(std::filesystem::path path, MetricsMode mode, ErrorHandler on_error);

  void write(const nlohmann::json& record);

  [[nodiscard]] bool has_failed() const { return has_failed_; }

 private:
  void fail(const char* operation, const std::string& reason);

  std::filesystem::path path_;
  ErrorHandler on_error_;
  std::ofstream stream_;
  bool has_failed_ = false;
};

}  // namespace report
