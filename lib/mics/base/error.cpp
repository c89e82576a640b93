// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>

namespace mics {
namespace {

std::string_view file_name(std::string_view path) {
  const auto slash = path.find_last_of('/');
  return slash == std::string_view::npos ? path : path.substr(slash + 1);
}

// Turns `mics::Lease mics::Engine::gather(mics::UnitId)` into `gather`.
std::string_view bare_function(std::string_view signature) {
  const auto parenthesis = signature.find('(');
  std::string_view head = signature.substr(0, parenthesis);
  if (const auto bracket = head.find('<');
      bracket != std::string_view::npos && head.find("operator") == std::string_view::npos) {
    head = head.substr(0, bracket);
  }
  const auto start = head.find_last_of(": ");
  return start == std::string_view::npos ? head : head.substr(start + 1);
}

}  // namespace

std::string in_quotes(std::string_view name) { return '"' + std::string(name) + '"'; }

std::string format_error(const ErrorText& text, std::source_location where) {
  std::string line;
  line += file_name(where.file_name());
  line += ':' + std::to_string(where.line()) + ' ';
  line += bare_function(where.function_name());
  if (!text.object.empty()) line += ": " + text.object;
  if (!text.expected.empty()) line += ": expected " + text.expected;
  if (!text.found.empty()) {
    constexpr std::size_t longest = 240;
    line += text.expected.empty() ? ": found " : ", found ";
    line += text.found.substr(0, longest) + (text.found.size() > longest ? "..." : "");
  }
  if (!text.remedy.empty()) line += "; " + text.remedy;
  // One line that a terminal can show, whatever a file or a user put into it.
  for (char& c : line) {
    const auto code = static_cast<unsigned char>(c);
    if (code < ' ' || code == 0x7f) c = ' ';
  }
  return line;
}

}  // namespace mics
