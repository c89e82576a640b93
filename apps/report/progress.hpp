// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>

namespace report {

/// True if the stream is a terminal: a bar may then be drawn over itself.
[[nodiscard]] bool is_terminal(std::FILE* stream);

enum class ProgressStyle : std::uint8_t { bar, lines };

struct ProgressOptions {
  ProgressStyle style = ProgressStyle::lines;
  std::int64_t first_step = 0;  // steps done before: after a restart
  std::int64_t last_step = 0;
  std::int64_t every = 10;  // lines: steps between two of them
  std::string unit = "tokens";
  std::string loss_unit = "bits/byte";
  double peak_rate = 0;  // units a second at the machine's peak; 0: not known, no share is shown
};

/// Step, loss, rate and remaining time of a training run on a stream, for one rank.
///
/// As a bar, drawn at most ten times a second:
///   [=========>          ] 140/300  2.871 bits/byte  21.3k tokens/s  41.0% of peak  ETA 0:25
/// As lines, each `every` steps and at the last one:
///   step 140/300  loss 2.871 bits/byte  21.3k tokens/s  41.0% of peak  ETA 0:25
/// The rate is that of the time since the previous output, the remaining time follows from the
/// whole run.
class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  Progress(std::ostream& stream, const ProgressOptions& options,
           Clock::time_point start = Clock::now());
  ~Progress();  // ends a bar's line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// Tells that `step` (1, 2, ... last_step) is done.
  /// \param[in] loss  of that step or of the last one known
  /// \param[in] work  tokens (or samples) of the step over all ranks
  void update(std::int64_t step, double loss, std::int64_t work,
              Clock::time_point now = Clock::now());

  /// Writes a line of its own: a validation result, a saved checkpoint.
  void message(const std::string& text);

 private:
  [[nodiscard]] std::string numbers(std::int64_t step, double loss, Clock::time_point now) const;
  void erase_bar();

  std::ostream& stream_;
  ProgressOptions options_;
  Clock::time_point start_;
  Clock::time_point last_output_;
  std::int64_t work_since_output_ = 0;
  std::size_t bar_width_ = 0;  // characters on the current line
};

/// 0:25, 3:07, 1:02:03; "--:--" if not known.
[[nodiscard]] std::string duration_text(double seconds);

/// Three significant digits with k, M, G: "21.3k".
[[nodiscard]] std::string rate_text(double rate);

}  // namespace report
