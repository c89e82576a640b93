// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>

namespace mics::apps::bench {

/// Whether bytes pass through the system's page cache.
enum class Cache : std::uint8_t { past, through };

/// Memory for files: on large pages, at a multiple of them, touched. Move-only.
class FileBuffer {
 public:
  explicit FileBuffer(std::int64_t bytes);
  [[nodiscard]] std::span<std::byte> bytes() const {
    return {memory_.get(), static_cast<std::size_t>(bytes_)};
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::int64_t bytes_;
};

// What a file costs without mics: the system calls and nothing else. Local; block; \throws IoError
// naming the file.

/// True if files of `folder` can be opened past the page cache.
[[nodiscard]] bool can_bypass_cache(const std::filesystem::path& folder);
/// Makes a new file of `bytes` bytes out of `buffer`, again and again, and fsyncs it. Space is
/// reserved before.
void write_raw(const std::filesystem::path& path, std::int64_t bytes, Cache cache,
               const FileBuffer& buffer);
/// Reads a whole file into `buffer`, again and again.
void read_raw(const std::filesystem::path& path, Cache cache, const FileBuffer& buffer);
/// Drops the file's pages from the cache.
void make_cold(const std::filesystem::path& path);
/// Writes what the file system still holds back, such as removals.
void settle(const std::filesystem::path& folder);

}  // namespace mics::apps::bench
