// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/h5/handle.hpp>

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace mics::h5 {

/// Reads an HDF5 file from its bytes in memory, which the caller has verified before: libhdf5
/// trusts what it parses. Nothing outside these bytes is read and no code loaded, whatever they
/// ask for: links that are not hard, and datasets that are not contiguous elements in the file
/// itself (external, virtual, compressed), are refused. Needs a Session. Local. \throws IoError,
/// FormatError
class ImageReader {
 public:
  /// Copies `bytes`. \param name  in messages
  ImageReader(std::string name, std::span<const std::byte> bytes);

  /// The elements of a dataset of unsigned bytes.
  [[nodiscard]] std::vector<std::byte> read_bytes(const std::string& path) const;
  /// The elements of a dataset of unsigned 32-bit integers.
  [[nodiscard]] std::vector<std::uint32_t> read_words(const std::string& path) const;

 private:
  template <class T>
  [[nodiscard]] std::vector<T> read(const std::string& path, hid_t type) const;

  void refuse(const std::string& path, const std::string& expected, const std::string& found) const;
  void require_hard_links(const std::string& path) const;
  void require_contiguous(const std::string& path, const Dataset& dataset) const;

  std::string name_;
  std::size_t bytes_ = 0;  // of the file
  File file_;
};

}  // namespace mics::h5
