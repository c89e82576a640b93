// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/detail/description.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace mics::checkpoint::detail {

inline constexpr std::string_view manifest_name = "manifest.h5";

/// The bytes of a manifest, complete but for what is known only when the pieces are written.
struct Manifest {
  std::vector<std::byte> bytes;
  std::int64_t block_crcs = 0;  ///< where the words of all pieces' blocks belong, in their order
  std::int64_t digests = 0;     ///< where the digests belong
};

/// A box of row-major elements.
struct Box {
  std::vector<std::int64_t> start;
  std::vector<std::int64_t> shape;
};

/// The elements [begin, end) of an array of that shape, row-major, as boxes that follow each other:
/// at most 2 N - 1 of them. Example: shape (4, 5), [3, 17): (0, 3..4), (1..2, 0..4), (3, 0..1).
[[nodiscard]] std::vector<Box> boxes_of(std::span<const std::int64_t> shape, std::int64_t begin,
                                        std::int64_t end);

/// Paths of the tensors below their group: the name's parts between slashes, where "", "." and
/// "..", control characters and "%" are escaped as %XX. A tensor whose path leads on to another
/// tensor's gets a "%" at its end.
[[nodiscard]] std::vector<std::string> tensor_paths(const std::vector<StoredTensor>& tensors);

/// Lays out the manifest. Needs an h5::Session. Local. Cost: a few microseconds a tensor, array and
/// piece that holds some of it.
/// \param blobs  the bytes of description.blobs, in that order
[[nodiscard]] Manifest make_manifest(const Description& description,
                                     std::span<const std::vector<std::byte>* const> blobs);

/// What a manifest says.
struct ManifestContents {
  Description description;                             ///< with state.blobs
  std::vector<std::vector<std::uint32_t>> block_crcs;  ///< of each piece
  std::vector<std::uint32_t> digests;                  ///< as DigestTable lists them
};

/// Reads verified bytes. Needs an h5::Session. \throws FormatError, IoError
[[nodiscard]] ManifestContents read_manifest(std::span<const std::byte> bytes);

/// Blocks of a file: what one CRC covers.
inline constexpr std::int64_t crc_block_bytes = std::int64_t{1} << 20;
[[nodiscard]] constexpr std::int64_t crc_blocks(std::int64_t bytes) {
  return (bytes + crc_block_bytes - 1) / crc_block_bytes;
}

}  // namespace mics::checkpoint::detail
