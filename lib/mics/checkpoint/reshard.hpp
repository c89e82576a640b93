// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/stored_state.hpp>
#include <mics/checkpoint/writer.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string_view>

namespace mics::checkpoint {

/// The text among the values that names the dtype of parameters that declare none.
inline constexpr std::string_view compute_dtype_text = "compute_dtype";

/// For whom a checkpoint is rewritten.
struct Reshaping {
  StoredGrid grid;
  std::optional<DType> compute = {};  ///< of parameters that declare none; none: as it was
  PieceSize size = {};
  std::int64_t window_bytes = std::int64_t{64} << 20;  ///< elements in memory at a time, at least 1
};

/// What a rewritten step is.
struct Resharded {
  std::filesystem::path folder;
  Commit commit;
  /// Arrays of tensors that are in another dtype than before, each rounded to nearest even once.
  std::int64_t converted = 0;
};

/// The state as the ranks of another grid hold it: the same buffers, padded for that grid. With
/// another compute dtype, frozen weights take it, and master weights and optimizer states that were
/// or become fp64 change; a buffer whose tensors then differ is cut in two.
/// \throws FormatError if the grid cannot hold it, or the state does not say its compute dtype
[[nodiscard]] StoredState reshaped(const StoredState& state, const StoredGrid& grid,
                                   std::optional<DType> compute);

/// Rewrites a step as the ranks of another grid would have saved it, in one process: verifies every
/// block that it reads, compares the digests of all tensors that keep their dtype, and commits by
/// the protocol of every save. Local; blocks until the step is durable. Memory: `window_bytes`,
/// 16 MiB of buffers and both manifests, whatever the size of the state. Cost: one pass over the
/// pieces, in which the MiB at the ends of each window are read twice; one write.
/// \param to  the directory of the new step; a step of that number there is replaced
/// \throws FormatError, IoError as Checkpoint::read; IoError if it cannot be written. Nothing is
///         committed then
[[nodiscard]] Resharded reshard(SystemCalls& calls, const Checkpoint& from, DirectoryWriter& to,
                                const Reshaping& reshaping);

}  // namespace mics::checkpoint
