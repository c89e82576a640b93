// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/log.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/detail/manifest.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/checkpoint/stored_state.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace mics::checkpoint {

/// Scalars of one array as they lie in memory after a read.
struct ReadSum {
  int buffer = -1;
  int array = -1;
  layout::Interval range;  ///< scalars of the buffer
  std::uint32_t crc = 0;   ///< of their bytes
};

/// What was read, to see that it was no more than needed and that it is where it belongs.
struct ReadCount {
  std::int64_t bytes = 0;  ///< from pieces
  std::int64_t files = 0;  ///< pieces opened
  /// Of all scalars that kept their dtype, without gaps and overlaps; in no order.
  std::vector<ReadSum> sums;
};

/// Called for each target, by its index, when all of its memory is filled.
using Filled = std::function<void(std::size_t target)>;

/// One committed step, opened: what it holds is known and verified, elements are read on demand.
/// All functions are local. libhdf5 sees verified bytes in memory only.
class Checkpoint {
 public:
  /// Reads and verifies COMMIT and the manifest, and the size of every file.
  /// \param folder  of the step
  /// \throws FormatError if something is damaged, missing or of another version, naming it; IoError
  [[nodiscard]] static Checkpoint open(SystemCalls& calls, const std::filesystem::path& folder);

  /// The half of open() that waits for the disk, without libhdf5: the bytes from which receive()
  /// makes the object, here or on another rank. \throws as open()
  [[nodiscard]] static std::vector<std::byte> fetch(SystemCalls& calls,
                                                    const std::filesystem::path& folder);
  /// The other half. \param bytes  what fetch() gave
  [[nodiscard]] static Checkpoint receive(SystemCalls& calls, const std::filesystem::path& folder,
                                          std::span<const std::byte> bytes);

  [[nodiscard]] const std::filesystem::path& folder() const { return folder_; }
  [[nodiscard]] const Commit& commit() const { return commit_; }
  /// With values and blobs.
  [[nodiscard]] const StoredState& state() const { return contents_->description.state; }
  /// Pieces a shard.
  [[nodiscard]] int parts() const { return contents_->description.parts; }
  /// The CRC of each tensor in each array, in the order of buffers, arrays, segments.
  [[nodiscard]] std::span<const std::uint32_t> digests() const { return contents_->digests; }
  /// Index of a tensor; -1 if it is not there.
  [[nodiscard]] int find_tensor(std::string_view name) const;
  /// The digest of a tensor in its array of that name (weights by either name), if the array is
  /// there and has that dtype.
  [[nodiscard]] std::optional<std::uint32_t> digest_of(int tensor, const StoredArray& array) const;
  /// Steps that changed the buffer of a tensor.
  [[nodiscard]] std::int64_t updates_of(int tensor) const;

  /// The steps that changed buffer `buffer` of `target`. \throws FormatError if its tensors come
  /// from buffers that were updated a different number of times
  [[nodiscard]] std::int64_t updates_for(const StoredState& target, int buffer) const;

  /// \throws FormatError naming the first tensor of `target` that is missing here or differs, with
  ///         both shapes, or the first tensor here that `target` lacks
  void require_same_tensors(const StoredState& target) const;

  /// \throws FormatError naming the first array that `targets` ask for and that is not here: it was
  ///         saved with another optimizer, or frozen. Tensors are those of require_same_tensors()
  void require_arrays(const StoredState& target, std::span<const Target> targets) const;

  /// Compares the digests of elements in another layout with those of the save.
  /// \param target   describes the elements
  /// \param digests  of each tensor in each array, in the order of buffers, arrays, segments
  /// \param wanted   whether an array of a buffer is compared
  /// \return digests that were compared; where the dtypes differ there is nothing to compare
  /// \throws FormatError naming the first array and tensor that differ
  std::int64_t require_same_digests(const StoredState& target,
                                    std::span<const std::uint32_t> digests,
                                    const std::function<bool(int buffer, int array)>& wanted) const;

  /// Fills memory of another layout, or the same: finds each scalar by tensor and array, whatever
  /// W, p, placement, buffers and dtypes either side has. Reads the blocks of 1 MiB that hold what
  /// is wanted, each once; the first that does not verify ends the read. Scalars of another dtype
  /// are rounded to nearest even. Gaps of the target become zero. master_weights and frozen_weights
  /// stand in for one another.
  ///
  /// Blocks. Memory: 8 MiB of buffers. Cost: the disk's sequential reads of the blocks touched;
  /// where the layout is the same, this rank's own pieces only.
  /// \param target   describes the memory: buffers, segments, arrays with their dtypes
  /// \param targets  what to fill
  /// \param filled   on the caller's thread; what it throws ends the read
  /// \param stop     ends the read before the next 2 MiB, in StateError
  /// \throws FormatError naming the file and block that is damaged, or the array that is not there;
  ///         IoError. The memory's contents are then undefined
  ReadCount read(const StoredState& target, std::span<const Target> targets,
                 const Filled& filled = {}, const std::stop_token& stop = {}) const;

 private:
  Checkpoint(SystemCalls& calls, std::filesystem::path folder, Commit commit,
             std::vector<std::byte> manifest);
  void require_room() const;

  SystemCalls* calls_;
  std::filesystem::path folder_;
  Commit commit_;
  std::vector<std::byte> manifest_;
  std::shared_ptr<const detail::ManifestContents> contents_;
  std::unordered_map<std::string_view, int> index_;  // of tensors by name
  std::vector<std::pair<int, int>> places_;          // of each tensor: buffer, segment
};

/// Opens the newest step of a directory that verifies so far (COMMIT, manifest, sizes); each that
/// does not costs a warning, but for one that is removed or replaced meanwhile: then it looks
/// again. None if there is none. Local. \throws IoError if the directory cannot be read
[[nodiscard]] std::optional<Checkpoint> open_newest(SystemCalls& calls,
                                                    const std::filesystem::path& directory,
                                                    const LogSink& log);

}  // namespace mics::checkpoint
