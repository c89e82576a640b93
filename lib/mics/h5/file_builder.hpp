// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/h5/handle.hpp>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace mics::h5 {

/// An HDF5 file whose metadata are there and whose elements are not: they belong at the offsets
/// that FileBuilder gave.
struct Skeleton {
  std::vector<std::byte> head;  ///< the file's first bytes, with all metadata
  std::int64_t bytes = 0;       ///< of the whole file; what is not in `head` is elements, or zero
};

/// A block of another file's one-dimensional dataset shown as a box of a virtual dataset.
struct VirtualBlock {
  std::vector<hsize_t> start;  ///< of the box
  std::vector<hsize_t> shape;  ///< of the box; its elements follow each other row-major
  std::string file;            ///< relative to the folder of the virtual dataset's file
  std::string dataset;         ///< its path in that file
  hsize_t source_start = 0;    ///< first element in the source
  hsize_t source_count = 0;    ///< elements of the whole source
};

/// Lays out an HDF5 file in memory (format bounds 1.10, contiguous datasets, nothing on disk): the
/// elements are written by the caller, past libhdf5, to the offsets that create_dataset() returns.
/// libhdf5 never sees the disk, so that a full or broken one cannot make it fail or crash.
///
/// Needs a Session. Local. Groups on the way to an object are created. \throws IoError
/// Cost: metadata only; a dataset of any size takes no memory.
class FileBuilder {
 public:
  /// \param name            in messages
  /// \param metadata_bytes  what the metadata will take at most, better too much: they are kept
  ///                        together, in front of the elements; the head has at least that size
  FileBuilder(std::string name, std::int64_t metadata_bytes);
  ~FileBuilder();
  FileBuilder(const FileBuilder&) = delete;
  FileBuilder& operator=(const FileBuilder&) = delete;

  /// A group with room for so many links, whose names have so many bytes together: its header then
  /// grows in no steps, each of which takes 28 bytes and what is left of the step before.
  void create_group(const std::string& path, std::int64_t links, std::int64_t name_bytes);

  /// A dataset, all of its space allocated.
  /// \return where its elements begin in the file, a multiple of 4096 where they take 64 KiB or
  ///         more; 0 if it has none
  std::int64_t create_dataset(const std::string& path, const Datatype& type,
                              std::span<const std::int64_t> shape);
  /// The same type, kept once in the file for all datasets that are created with the result.
  [[nodiscard]] Datatype share(Datatype type);
  /// Unsigned bytes, for texts and blobs.
  std::int64_t create_bytes(const std::string& path, std::int64_t bytes);
  /// A dataset that shows blocks of other files' datasets of the same type; `fill`, one element,
  /// where no block lies and where a source is missing.
  void create_virtual(const std::string& path, const Datatype& type,
                      std::span<const std::int64_t> shape, std::span<const VirtualBlock> blocks,
                      std::span<const std::byte> fill);

  /// Attributes of an object, `/` being the file; at least one value.
  void attribute(const std::string& object, const std::string& name, const std::string& text);
  void attribute(const std::string& object, const std::string& name, std::int64_t value);
  void attribute(const std::string& object, const std::string& name,
                 std::span<const std::int64_t> values);

  /// Closes the file. To be called once, last.
  [[nodiscard]] Skeleton finish();

 private:
  void create_attribute(const std::string& object, const std::string& name, hid_t type,
                        const Dataspace& space, const void* data);

  std::string name_;
  std::unique_ptr<std::vector<std::byte>> head_;  // where libhdf5's own memory ends up
  PropertyList links_;
  File file_;
};

}  // namespace mics::h5
