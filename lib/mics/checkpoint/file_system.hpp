// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sys/stat.h>
#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mics::checkpoint {

/// The system calls that checkpoints are made of: each function is one call, and returns and sets
/// errno as it does. A derived class injects faults in tests; nothing else of checkpoints touches
/// files. One object may be used by several threads at once.
class SystemCalls {
 public:
  SystemCalls() = default;
  SystemCalls(const SystemCalls&) = delete;
  SystemCalls& operator=(const SystemCalls&) = delete;
  virtual ~SystemCalls() = default;

  /// The operating system's.
  [[nodiscard]] static SystemCalls& native();

  virtual int open(const char* path, int flags, mode_t mode);
  virtual int close(int descriptor);
  virtual ssize_t pwrite(int descriptor, const void* data, std::size_t bytes, off_t offset);
  virtual ssize_t pread(int descriptor, void* data, std::size_t bytes, off_t offset);
  virtual int fsync(int descriptor);
  virtual int ftruncate(int descriptor, off_t bytes);
  virtual int fallocate(int descriptor, off_t bytes);
  virtual int flock(int descriptor, int operation);
  virtual int fstat(int descriptor, struct ::stat* status);
  virtual int stat(const char* path, struct ::stat* status);
  virtual int mkdir(const char* path, mode_t mode);
  virtual int rename(const char* from, const char* to);
  /// Fails with EEXIST if `to` exists.
  virtual int rename_new(const char* from, const char* to);
  /// Swaps two entries that exist, at once.
  virtual int exchange(const char* from, const char* to);
  virtual int unlink(const char* path);
  virtual int rmdir(const char* path);
};

/// How a file is opened.
enum class Access : std::uint8_t {
  read,
  read_direct,   ///< past the page cache if the file system can, else as `read`
  write,         ///< a new file; an error if it exists
  write_direct,  ///< the same, past the page cache if the file system can
  lock,          ///< made if it is not there, for reading and writing
  folder,        ///< a directory, to fsync it
};

/// Memory, offsets and lengths of direct reads and writes are multiples of this.
inline constexpr std::int64_t direct_alignment = 4096;

/// An open file. Move-only. Every function is local and blocks until the system has answered;
/// short reads and writes are continued, interrupted calls repeated. \throws IoError naming the
/// file and the system's reason
class File {
 public:
  File(SystemCalls& calls, const std::filesystem::path& path, Access access);
  File(File&& other) noexcept;
  File& operator=(File&&) = delete;
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  /// Closes and ignores the result: what was written is durable after sync(), and only then.
  ~File();

  /// True if it goes past the page cache: see direct_alignment.
  [[nodiscard]] bool direct() const { return direct_; }
  [[nodiscard]] std::int64_t bytes() const;

  /// Reserves space, so that a full disk is found before the work; does nothing where the file
  /// system cannot.
  void reserve(std::int64_t bytes);
  void write(std::span<const std::byte> data, std::int64_t offset);
  /// Reads exactly `data.size()` bytes. \throws FormatError if the file ends before
  void read(std::span<std::byte> data, std::int64_t offset) const;
  /// As read(), but returns how many bytes there were.
  [[nodiscard]] std::int64_t read_some(std::span<std::byte> data, std::int64_t offset) const;
  void resize(std::int64_t bytes);
  /// Makes contents and size durable. After an error the file is lost: a second call would succeed
  /// without having written.
  void sync();
  void close();
  /// False if another process, or another open file, holds it. The lock ends with the file.
  [[nodiscard]] bool try_lock();
  /// False if another file, or none, has its name by now.
  [[nodiscard]] bool has_its_name() const;

 private:
  [[noreturn]] void fail(std::string_view what, int reason) const;

  SystemCalls* calls_;
  std::filesystem::path path_;
  int descriptor_ = -1;
  bool direct_ = false;
};

/// Reads a whole file. \throws IoError; FormatError if it has more than `most` bytes
[[nodiscard]] std::vector<std::byte> read_file(SystemCalls& calls,
                                               const std::filesystem::path& path,
                                               std::int64_t most);

/// Makes the entries of a directory durable. \throws IoError
void sync_folder(SystemCalls& calls, const std::filesystem::path& path);

/// \throws IoError naming `path` and the system's reason `number`
[[noreturn]] void raise_io(std::string_view what, const std::filesystem::path& path, int number);

}  // namespace mics::checkpoint
