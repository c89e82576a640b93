// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/detail/manifest.hpp>
#include <mics/checkpoint/detail/piece.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/checkpoint/stored_state.hpp>
#include <mics/h5/file_builder.hpp>
#include <mics/layout/group_layout.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mics::checkpoint {

/// Into how many files the R replicas of a shard cut it.
struct PieceSize {
  std::int64_t min_bytes = std::int64_t{8} << 20;  ///< fewer, larger pieces below this
  int max_parts = 0;                               ///< of a shard; 0: no limit
};

/// Pieces a shard of `state`, 1 .. R. Where optimizer state is sliced over the replicas it is R:
/// each rank writes what it owns.
[[nodiscard]] int parts_of_shard(const StoredState& state, const PieceSize& size);

/// The part that replica `replica` writes; none if it writes nothing. Writers are spread evenly
/// over the replicas, and with them over the nodes.
[[nodiscard]] std::optional<int> part_of_replica(int replica, int replicas, int parts);

/// The scalars of a buffer that the rank in `place` writes, a part of its shard; none: empty.
[[nodiscard]] layout::Interval written_range(const StoredState& state, const layout::Place& place,
                                             int buffer, const PieceSize& size = {});

/// A random name for a save: 16 hexadecimal digits.
[[nodiscard]] std::string make_save_id();

/// What is known of a piece only when its bytes have been put together.
struct PieceSums {
  std::uint32_t crc = 0;                  ///< of the file
  bool direct = false;                    ///< written past the page cache
  std::vector<std::uint32_t> block_crcs;  ///< of each MiB
  std::vector<std::uint32_t> part_crcs;   ///< of each tensor's part, in the order of the contents
  friend bool operator==(const PieceSums&, const PieceSums&) = default;
};

/// Gives bytes of a piece's file that belong to one array, where they lie in no memory beforehand:
/// valid until the next call. Calls ascend.
using Supply = std::function<const std::byte*(const layout::Interval& bytes)>;

/// Memory to copy, a part of one source.
struct Copy {
  int source = -1;
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  std::int64_t bytes = 0;
};

/// One rank's file of a checkpoint: laid out by the constructor, on the caller's thread, written
/// by write(), on any.
class PieceWriter {
 public:
  /// Local; calls libhdf5. Cost: metadata only.
  PieceWriter(const StoredState& state, detail::PieceId id, int parts, std::string_view save_id);

  [[nodiscard]] detail::PieceId id() const { return id_; }
  [[nodiscard]] const detail::Piece& piece() const { return piece_; }
  /// Bytes of arrays that the piece holds: what stage() copies.
  [[nodiscard]] std::int64_t payload_bytes() const;

  /// Points at the memory to write. \throws ArgumentError if `sources` lack a part of the piece
  void attach(std::span<const Source> sources);
  /// Takes all elements from `supply`, which write() calls on its own thread.
  void attach(Supply supply);
  /// Points at `buffer`, payload_bytes() long, where the piece's part of the memory is to be.
  /// \return what the caller copies there before write(), by source and ascending; the originals
  ///         may change afterwards. \throws as attach()
  [[nodiscard]] std::vector<Copy> stage(std::span<const Source> sources,
                                        std::span<std::byte> buffer);

  /// Writes the file into `folder` and makes it durable. Calls neither MPI nor libhdf5. Blocks.
  /// Each byte is read once, copied into one of four buffers of 2 MiB and summed there; floor: the
  /// disk's sequential writes past the page cache. \throws IoError; a file that is left behind is
  /// incomplete
  [[nodiscard]] PieceSums write(SystemCalls& calls, const std::filesystem::path& folder) const;

 private:
  // Bytes of the file that come from memory.
  struct Fragment {
    std::int64_t offset = 0;  // in the file
    std::int64_t bytes = 0;
    const std::byte* data = nullptr;
    int part = -1;    // index in part_crcs; -1: a gap
    int source = -1;  // that `data` is part of
  };
  // `data_of(dataset, run)` is where the first element of a run lies, and in which source.
  template <class DataOf>
  void make_fragments(DataOf&& data_of);
  void fill(std::span<std::byte> chunk, std::int64_t offset, std::size_t& next,
            PieceSums& sums) const;

  detail::PieceId id_;
  detail::Piece piece_;
  h5::Skeleton skeleton_;
  std::vector<detail::PieceDataset> contents_;
  Supply supply_;
  std::vector<Fragment> fragments_;                                  // ascending, without overlaps
  std::vector<std::vector<std::pair<layout::Interval, int>>> runs_;  // of each run: parts and gaps
  std::size_t parts_ = 0;
};

/// The digests of all elements and the COMMIT of a step from what its writers report.
/// \param pieces, sums  in the order of the pieces
[[nodiscard]] std::vector<std::uint32_t> combine_digests(const StoredState& state, int parts,
                                                         std::span<const PieceSums> sums);

/// One number for all elements of all arrays, whatever the layout, the order of tensors and who
/// wrote: the CRC of a text with one sorted line an array and tensor. See FORMAT.md.
[[nodiscard]] std::uint32_t state_digest(const StoredState& state,
                                         std::span<const std::uint32_t> digests);

/// The coordinator's part of a save: the manifest, laid out at the start, completed at the end.
class StepWriter {
 public:
  /// Local; calls libhdf5. \param pieces  of all writers, in their order
  StepWriter(const StoredState& state, int parts, std::string save_id,
             std::vector<detail::Piece> pieces);

  /// Fills in what the writers report. \return what to commit; manifest() is then complete. Calls
  /// neither MPI nor libhdf5.
  [[nodiscard]] Commit complete(std::span<const PieceSums> sums);
  [[nodiscard]] std::span<const std::byte> manifest() const { return manifest_.bytes; }

 private:
  detail::Description description_;
  detail::Manifest manifest_;
};

}  // namespace mics::checkpoint
