// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>
#include <vector>

namespace data {

/// The bytes of a file for reading. From 1 MiB on the file is mapped into memory, not copied: its
/// pages are read when they are touched and shared by the ranks of a node, and it must not be
/// shortened as long as the object lives. Smaller files are copied. Move-only.
class FileBytes {
 public:
  static constexpr std::size_t mapped_from = std::size_t{1} << 20;

  /// Local. \throws mics::ArgumentError if the file cannot be opened, read or mapped
  explicit FileBytes(const std::filesystem::path& path);
  ~FileBytes();
  FileBytes(FileBytes&& other) noexcept;
  FileBytes& operator=(FileBytes&&) = delete;
  FileBytes(const FileBytes&) = delete;

  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
  std::vector<std::byte> copy_;  // of a small file
  void* mapping_ = nullptr;      // of a large one
};

}  // namespace data
