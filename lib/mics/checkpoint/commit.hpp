// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/stored_state.hpp>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mics::checkpoint {

/// Version of the format that this release writes, and the only one that it reads.
inline constexpr std::int64_t format_version = 1;

/// The text file that makes a step a checkpoint: it names every other file of the step.
inline constexpr std::string_view commit_name = "COMMIT";

/// A file as COMMIT names it.
struct CommittedFile {
  std::string name;
  std::int64_t bytes = 0;
  std::uint32_t crc = 0;  ///< CRC-32C of all its bytes
  friend bool operator==(const CommittedFile&, const CommittedFile&) = default;
};

/// What COMMIT says.
struct Commit {
  std::int64_t step = 0;
  std::string id;      ///< of the save: 16 hexadecimal digits
  std::string time;    ///< UTC, `2026-11-22T22:36:50Z`
  std::string writer;  ///< `mics 0.1.0`
  StoredGrid grid;
  std::uint32_t digest = 0;          ///< of all elements, whatever the layout
  std::vector<CommittedFile> files;  ///< the manifest first, then the pieces in their order
  friend bool operator==(const Commit&, const Commit&) = default;
};

/// The text, which ends with the CRC of what comes before.
[[nodiscard]] std::string to_text(const Commit& commit);

/// Accepts exactly what to_text() writes. Reads nothing but `text`, however it is damaged.
/// \param object  what is read, in messages
/// \throws FormatError naming the line; of another version, the version
[[nodiscard]] Commit parse_commit(std::string_view text, std::string_view object);

/// 8 hexadecimal digits, lower case.
[[nodiscard]] std::string hex(std::uint32_t value);

}  // namespace mics::checkpoint
