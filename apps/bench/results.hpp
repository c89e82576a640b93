// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <nlohmann/json.hpp>
#include <program/session.hpp>
#include <report/metrics.hpp>

#include <cstdint>
#include <string>

namespace mics::apps::bench {

/// Prints the rows of a table as they are measured and writes them as JSON lines; rank 0 only.
/// Remembers whether a bar was missed.
class Results {
 public:
  /// \param bench  name of the command, in every record
  /// \param json   file for the records; empty: none
  Results(const Session& session, std::string bench, const std::string& json);

  void line(const std::string& text) const;
  void record(nlohmann::json fields);

  /// What the table shows of `measured` beside `bar`: `bar 0.95 met`, `bar 0.95 MISSED`.
  std::string judge(bool met, double bar, int digits = 2);

  /// Tells the outcome of all bars; the exit status.
  [[nodiscard]] int finish(bool check) const;

 private:
  bool is_root_;
  int ranks_;
  std::string bench_;
  report::MetricsWriter records_;
  int bars_ = 0;
  int missed_ = 0;
};

/// `64 KiB`, `1 MiB`: the largest unit that leaves a number of at least 1.
[[nodiscard]] std::string bytes_text(std::int64_t bytes);
/// `12.3 us`, `4.57 ms`: three digits.
[[nodiscard]] std::string time_text(double seconds);
/// `value` with `digits` behind the point, at least `width` characters.
[[nodiscard]] std::string number_text(double value, int digits, int width = 0);
/// `text` with spaces before it, or behind it, up to `width` characters.
[[nodiscard]] std::string padded(const std::string& text, int width);
[[nodiscard]] std::string padded_left(const std::string& text, int width);

}  // namespace mics::apps::bench
