// SPDX-License-Identifier: Apache-2.0
#include <report/progress.hpp>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

namespace report {

namespace {

constexpr std::size_t bar_cells = 20;
constexpr double seconds_between_drawings = 0.1;

double seconds(Progress::Clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

std::string format(const char* pattern, double value) {
  char text[64];
  std::snprintf(text, sizeof text, pattern, value);
  return text;
}

}  // namespace

bool is_terminal(std::FILE* stream) {
  if (isatty(fileno(stream)) != 1) return false;
  // Open MPI gives rank 0 a pseudo-terminal whatever its own output is: then the launcher's counts,
  // which is the parent process, or out of sight on another node.
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) return true;
  std::error_code error;
  const auto output = std::filesystem::read_symlink(
      "/proc/" + std::to_string(getppid()) + "/fd/" + std::to_string(fileno(stream)), error);
  const std::string target = error ? "" : output.string();
  return target.starts_with("/dev/pts/") || target.starts_with("/dev/tty");
}

std::string duration_text(double value) {
  if (!std::isfinite(value) || value < 0 || value > 1e9) return "--:--";
  const auto total = static_cast<long>(std::lround(value));
  char text[48];
  if (total >= 3600) {
    std::snprintf(text, sizeof text, "%ld:%02ld:%02ld", total / 3600, total / 60 % 60, total % 60);
  } else {
    std::snprintf(text, sizeof text, "%ld:%02ld", total / 60, total % 60);
  }
  return text;
}

std::string rate_text(double rate) {
  const char* prefix = "";
  for (const char* larger : {"k", "M", "G", "T"}) {
    if (!(rate >= 999.5)) break;
    rate /= 1000;
    prefix = larger;
  }
  const char* pattern = rate < 9.995 ? "%.2f" : rate < 99.95 ? "%.1f" : "%.0f";
  return format(pattern, rate) + prefix;
}

Progress::Progress(std::ostream& stream, const ProgressOptions& options, Clock::time_point start)
    : stream_(stream), options_(options), start_(start), last_output_(start) {}

Progress::~Progress() {
  if (bar_width_ > 0) stream_ << std::endl;
}

void Progress::update(std::int64_t step, double loss, std::int64_t work, Clock::time_point now) {
  work_since_output_ += work;
  const bool is_last = step >= options_.last_step;
  const std::string count = std::to_string(step) + "/" + std::to_string(options_.last_step);
  if (options_.style == ProgressStyle::lines) {
    if (!is_last && (options_.every < 1 || step % options_.every != 0)) return;
    stream_ << "step " << count << "  loss " << numbers(step, loss, now) << std::endl;
  } else {
    if (!is_last && bar_width_ > 0 && seconds(now - last_output_) < seconds_between_drawings)
      return;
    const double share =
        options_.last_step > 0
            ? std::clamp(static_cast<double>(step) / static_cast<double>(options_.last_step), 0.0,
                         1.0)
            : 1.0;
    const auto filled = static_cast<std::size_t>(share * bar_cells);
    std::string bar(filled, '=');
    if (filled < bar_cells) bar += '>';
    bar.resize(bar_cells, ' ');
    std::string text = "[" + bar + "] " + count + "  " + numbers(step, loss, now);
    const std::size_t width = text.size();
    if (width < bar_width_) text.append(bar_width_ - width, ' ');  // over what stood there
    stream_ << '\r' << text << std::flush;
    bar_width_ = width;
  }
  last_output_ = now;
  work_since_output_ = 0;
}

void Progress::message(const std::string& text) {
  erase_bar();
  stream_ << text << std::endl;
}

std::string Progress::numbers(std::int64_t step, double loss, Clock::time_point now) const {
  const double since_output = seconds(now - last_output_);
  const double rate = since_output > 0 ? static_cast<double>(work_since_output_) / since_output : 0;
  const std::int64_t done = step - options_.first_step;
  const double remaining =
      done > 0 ? seconds(now - start_) / static_cast<double>(done) *
                     static_cast<double>(std::max<std::int64_t>(0, options_.last_step - step))
               : -1;
  std::string text = format("%.3f", loss) + " " + options_.loss_unit + "  " + rate_text(rate) +
                     " " + options_.unit + "/s";
  if (options_.peak_rate > 0) text += format("  %.1f%% of peak", 100 * rate / options_.peak_rate);
  return text + "  ETA " + duration_text(remaining);
}

void Progress::erase_bar() {
  if (bar_width_ == 0) return;
  stream_ << '\r' << std::string(bar_width_, ' ') << '\r';
  bar_width_ = 0;
}

}  // namespace report
