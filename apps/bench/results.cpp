// SPDX-License-Identifier: Apache-2.0
#include <bench/results.hpp>

#include <array>
#include <cstdio>
#include <iostream>
#include <utility>

namespace mics::apps::bench {

Results::Results(const Session& session, std::string bench, const std::string& json)
    : is_root_(session.is_root()),
      ranks_(session.size()),
      bench_(std::move(bench)),
      records_(is_root_ ? json : std::string(), report::MetricsMode::replace,
               [](const std::string& message) { std::cerr << "mics: " << message << std::endl; }) {}

void Results::line(const std::string& text) const {
  if (is_root_) std::cout << text << std::endl;
}

void Results::record(nlohmann::json fields) {
  fields["bench"] = bench_;
  fields["ranks"] = ranks_;
  records_.write(fields);
}

std::string Results::judge(bool met, double bar, int digits) {
  ++bars_;
  if (!met) ++missed_;
  return "bar " + number_text(bar, digits) + (met ? " met" : " MISSED");
}

int Results::finish(bool check) const {
  if (bars_ > 0) {
    line(std::to_string(bars_ - missed_) + " of " + std::to_string(bars_) + " bars met");
  }
  return check && missed_ > 0 ? 1 : 0;
}

std::string bytes_text(std::int64_t bytes) {
  constexpr std::array<const char*, 4> units{"B", "KiB", "MiB", "GiB"};
  auto value = static_cast<double>(bytes);
  std::size_t unit = 0;
  for (; value >= 1024 && unit + 1 < units.size(); ++unit) value /= 1024;
  const bool whole = value == static_cast<double>(static_cast<std::int64_t>(value));
  return number_text(value, whole ? 0 : 1) + ' ' + units[unit];
}

std::string time_text(double seconds) {
  constexpr std::array<const char*, 3> units{"s", "ms", "us"};
  std::size_t unit = 0;
  for (; seconds < 1 && unit + 1 < units.size(); ++unit) seconds *= 1000;
  return number_text(seconds, seconds < 10 ? 2 : seconds < 100 ? 1 : 0) + ' ' + units[unit];
}

std::string number_text(double value, int digits, int width) {
  std::array<char, 64> text{};
  std::snprintf(text.data(), text.size(), "%*.*f", width, digits, value);
  return text.data();
}

std::string padded(const std::string& text, int width) {
  const auto length = static_cast<std::size_t>(width);
  return text.size() < length ? std::string(length - text.size(), ' ') + text : text;
}

std::string padded_left(const std::string& text, int width) {
  const auto length = static_cast<std::size_t>(width);
  return text.size() < length ? text + std::string(length - text.size(), ' ') : text;
}

}  // namespace mics::apps::bench
