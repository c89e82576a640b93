// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/detail/piece.hpp>
#include <mics/checkpoint/stored_state.hpp>

#include <string>
#include <string_view>
#include <vector>

namespace mics::checkpoint::detail {

/// A stored state and the files that hold it: what the dataset /index/description says, as JSON.
/// Blobs are named with their sizes only.
struct Description {
  StoredState state;
  std::string id;  ///< of the save, 16 hexadecimal digits
  int parts = 1;   ///< pieces a shard
  std::vector<Piece> pieces;
  std::vector<std::pair<std::string, std::int64_t>> blobs;  ///< names and bytes
};

[[nodiscard]] std::string to_json(const Description& description);

/// \throws FormatError for anything but what to_json() writes, unknown keys apart
[[nodiscard]] Description from_json(std::string_view text);

}  // namespace mics::checkpoint::detail
