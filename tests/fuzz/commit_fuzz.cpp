// SPDX-License-Identifier: Apache-2.0
#include "fuzz.hpp"
#include <mics/base/error.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/crc32c.hpp>

#include <cstddef>
#include <cstdint>
#include <set>
#include <span>
#include <string>
#include <string_view>

namespace {

using namespace mics::checkpoint;
using mics::fuzz::require;
using namespace std::string_view_literals;

void read(std::string_view text) {
  try {
    const Commit commit = parse_commit(text, "COMMIT");
    require(to_text(commit) == text);
    require(commit.step >= 0);
    std::set<std::string> names;
    for (const CommittedFile& file : commit.files) {
      require(file.bytes >= 0 && names.insert(file.name).second);
      // Nothing that leads out of the folder, or hides in it.
      require(!file.name.empty() && file.name.front() != '.' && file.name != commit_name);
      require(file.name.find_first_of("/\\\0"sv) == std::string::npos);
    }
  } catch (const mics::FormatError& error) {
    mics::fuzz::require_one_line(error.what());
  }
}

}  // namespace

// The bytes as they are, and with the last line that they ought to have: what follows is refused
// for its checksum otherwise.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(data, data + size);
  read(text);
  std::string body = text.substr(0, text.rfind("end "));
  const auto bytes = std::as_bytes(std::span(body.data(), body.size()));
  read(body + "end " + hex(crc32c(bytes)) + '\n');
  return 0;
}
