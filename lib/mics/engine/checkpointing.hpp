// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/saver.hpp>

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace mics {

/// Bytes of the application's own by name, kept inside a checkpoint's commit. The same on every
/// rank.
using Blobs = std::map<std::string, std::vector<std::byte>>;

/// What may be said of a save beside its directory.
struct SaveRequest {
  checkpoint::Retention retention = {};  ///< which older steps are removed after the commit
  bool asynchronous = false;  ///< return when the state may change; a thread writes what was copied
  Blobs blobs = {};           ///< for what ranks have apart, gather it first
};

/// What may be said of a load beside its directory.
struct LoadRequest {
  std::optional<std::int64_t> step = {};  ///< a step that must be taken; none: the newest
  /// Leaves the optimizer's states, the counters and the loss scale as they are; so does every load
  /// into an engine that is forward only, which has none.
  bool weights_only = false;
};

/// What a load brought back.
struct LoadResult {
  std::int64_t step = 0;     ///< optimizer steps taken before the save
  std::uint32_t digest = 0;  ///< of all elements, whatever the layout: COMMIT's
  Blobs blobs = {};
};

}  // namespace mics
