// SPDX-License-Identifier: Apache-2.0
// What the fuzzers share. Each defines LLVMFuzzerTestOneInput, which libFuzzer calls, and
// replay.cpp where there is no libFuzzer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace mics::fuzz {

inline void require(bool good) {
  if (!good) std::abort();
}

/// What is promised of every error.
inline void require_one_line(std::string_view what) {
  require(!what.empty() && what.find_first_of("\r\n") == std::string_view::npos);
}

/// The input cut at each byte 0xFF, which is in no text of UTF-8: at least one part.
inline std::vector<std::string> parts_of(const std::uint8_t* data, std::size_t size) {
  const std::string bytes(data, data + size);
  std::vector<std::string> parts;
  for (std::size_t begin = 0;;) {
    const std::size_t end = bytes.find('\xFF', begin);
    parts.push_back(bytes.substr(begin, end - begin));
    if (end == std::string::npos) return parts;
    begin = end + 1;
  }
}

}  // namespace mics::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
