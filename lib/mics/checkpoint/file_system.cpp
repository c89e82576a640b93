// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/file_system.hpp>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <system_error>

namespace mics::checkpoint {
namespace {

// The kernel moves at most this much with one call, rounded down to pages.
constexpr std::size_t most_per_call = std::size_t{1} << 30;

// Repeats a call that a signal interrupted.
template <class Call>
auto uninterrupted(Call&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

}  // namespace

SystemCalls& SystemCalls::native() {
  static SystemCalls calls;
  return calls;
}

int SystemCalls::open(const char* path, int flags, mode_t mode) {
  return ::open(path, flags, mode);
}
int SystemCalls::close(int descriptor) { return ::close(descriptor); }
ssize_t SystemCalls::pwrite(int descriptor, const void* data, std::size_t bytes, off_t offset) {
  return ::pwrite(descriptor, data, bytes, offset);
}
ssize_t SystemCalls::pread(int descriptor, void* data, std::size_t bytes, off_t offset) {
  return ::pread(descriptor, data, bytes, offset);
}
int SystemCalls::fsync(int descriptor) { return ::fsync(descriptor); }
int SystemCalls::ftruncate(int descriptor, off_t bytes) { return ::ftruncate(descriptor, bytes); }
int SystemCalls::fallocate(int descriptor, off_t bytes) {
  return ::fallocate(descriptor, 0, 0, bytes);
}
int SystemCalls::flock(int descriptor, int operation) { return ::flock(descriptor, operation); }
int SystemCalls::fstat(int descriptor, struct ::stat* status) {
  return ::fstat(descriptor, status);
}
int SystemCalls::stat(const char* path, struct ::stat* status) { return ::stat(path, status); }
int SystemCalls::mkdir(const char* path, mode_t mode) { return ::mkdir(path, mode); }
int SystemCalls::rename(const char* from, const char* to) { return ::rename(from, to); }
int SystemCalls::rename_new(const char* from, const char* to) {
  return ::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_NOREPLACE);
}
int SystemCalls::exchange(const char* from, const char* to) {
  return ::renameat2(AT_FDCWD, from, AT_FDCWD, to, RENAME_EXCHANGE);
}
int SystemCalls::unlink(const char* path) { return ::unlink(path); }
int SystemCalls::rmdir(const char* path) { return ::rmdir(path); }

void raise_io(std::string_view what, const std::filesystem::path& path, int number) {
  raise<IoError>({.object = in_quotes(path.string()),
                  .expected = "to " + std::string(what),
                  .found = std::generic_category().message(number)});
}

File::File(SystemCalls& calls, const std::filesystem::path& path, Access access)
    : calls_(&calls), path_(path) {
  int flags = O_CLOEXEC;
  mode_t mode = 0;
  switch (access) {
    case Access::read:
    case Access::read_direct:
      // Not to wait for a writer where somebody put a pipe.
      flags |= O_RDONLY | O_NONBLOCK;
      break;
    case Access::write:
    case Access::write_direct:
      flags |= O_WRONLY | O_CREAT | O_EXCL;
      mode = 0666;
      break;
    case Access::lock:
      flags |= O_RDWR | O_CREAT;
      mode = 0666;
      break;
    case Access::folder:
      flags |= O_RDONLY | O_DIRECTORY;
      break;
  }
  const auto open = [&](int extra) {
    return uninterrupted([&] { return calls_->open(path_.c_str(), flags | extra, mode); });
  };
  if (access == Access::read_direct || access == Access::write_direct) {
    descriptor_ = open(O_DIRECT);
    direct_ = descriptor_ >= 0;
    if (direct_ || errno != EINVAL) {
      if (!direct_) fail("open it", errno);
      return;
    }
    // A file system that refuses O_DIRECT may have made the file before it did.
    flags &= ~O_EXCL;
  }
  descriptor_ = open(0);
  if (descriptor_ < 0) {
    fail(access == Access::write || access == Access::write_direct ? "create it" : "open it",
         errno);
  }
}

File::File(File&& other) noexcept
    : calls_(other.calls_),
      path_(std::move(other.path_)),
      descriptor_(std::exchange(other.descriptor_, -1)),
      direct_(other.direct_) {}

File::~File() {
  if (descriptor_ >= 0) calls_->close(descriptor_);
}

void File::fail(std::string_view what, int reason) const { raise_io(what, path_, reason); }

std::int64_t File::bytes() const {
  struct ::stat status {};
  if (uninterrupted([&] { return calls_->fstat(descriptor_, &status); }) != 0) {
    fail("tell its size", errno);
  }
  if (!S_ISREG(status.st_mode)) {
    raise<FormatError>({.object = in_quotes(path_.string()),
                        .expected = "a file",
                        .found = S_ISDIR(status.st_mode) ? "a folder" : "a pipe or a device"});
  }
  return status.st_size;
}

void File::reserve(std::int64_t bytes) {
  if (bytes == 0 || uninterrupted([&] { return calls_->fallocate(descriptor_, bytes); }) == 0) {
    return;
  }
  if (errno != EOPNOTSUPP && errno != ENOSYS && errno != EINVAL) {
    fail("reserve " + std::to_string(bytes) + " bytes", errno);
  }
}

void File::write(std::span<const std::byte> data, std::int64_t offset) {
  while (!data.empty()) {
    const ssize_t done = uninterrupted([&] {
      return calls_->pwrite(descriptor_, data.data(), std::min(data.size(), most_per_call), offset);
    });
    if (done < 0) fail("write " + std::to_string(data.size()) + " bytes", errno);
    if (done == 0) fail("write " + std::to_string(data.size()) + " bytes", ENOSPC);
    data = data.subspan(static_cast<std::size_t>(done));
    offset += done;
    // The rest of a short write may not be aligned; the page cache takes it.
    if (direct_ && done % direct_alignment != 0 && !data.empty()) {
      const int flags = ::fcntl(descriptor_, F_GETFL);
      if (flags < 0 || ::fcntl(descriptor_, F_SETFL, flags & ~O_DIRECT) != 0) {
        fail("go on after a short write", errno);
      }
    }
  }
}

std::int64_t File::read_some(std::span<std::byte> data, std::int64_t offset) const {
  std::int64_t total = 0;
  while (!data.empty()) {
    const ssize_t done = uninterrupted([&] {
      return calls_->pread(descriptor_, data.data(), std::min(data.size(), most_per_call), offset);
    });
    if (done < 0) fail("read " + std::to_string(data.size()) + " bytes", errno);
    if (done == 0) break;
    data = data.subspan(static_cast<std::size_t>(done));
    offset += done;
    total += done;
    // A direct read is short and not aligned at the end of the file only.
    if (direct_ && done % direct_alignment != 0) break;
  }
  return total;
}

void File::read(std::span<std::byte> data, std::int64_t offset) const {
  const std::int64_t found = read_some(data, offset);
  if (found == static_cast<std::int64_t>(data.size())) return;
  raise<FormatError>({.object = in_quotes(path_.string()),
                      .expected = "bytes up to " + std::to_string(offset + std::ssize(data)),
                      .found = "an end at " + std::to_string(offset + found),
                      .remedy = "the file was cut short"});
}

void File::resize(std::int64_t bytes) {
  if (uninterrupted([&] { return calls_->ftruncate(descriptor_, bytes); }) != 0) {
    fail("set its size to " + std::to_string(bytes), errno);
  }
}

void File::sync() {
  if (uninterrupted([&] { return calls_->fsync(descriptor_); }) != 0) fail("fsync it", errno);
}

void File::close() {
  const int descriptor = std::exchange(descriptor_, -1);
  // Linux has closed it even where a signal interrupted.
  if (descriptor >= 0 && calls_->close(descriptor) != 0 && errno != EINTR) fail("close it", errno);
}

bool File::try_lock() {
  if (uninterrupted([&] { return calls_->flock(descriptor_, LOCK_EX | LOCK_NB); }) == 0) {
    return true;
  }
  if (errno != EWOULDBLOCK) fail("lock it", errno);
  return false;
}

bool File::has_its_name() const {
  struct ::stat own {};
  struct ::stat there {};
  if (uninterrupted([&] { return calls_->fstat(descriptor_, &own); }) != 0) {
    fail("tell which it is", errno);
  }
  if (uninterrupted([&] { return calls_->stat(path_.c_str(), &there); }) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) return false;
    fail("tell which it is", errno);
  }
  return own.st_dev == there.st_dev && own.st_ino == there.st_ino;
}

std::vector<std::byte> read_file(SystemCalls& calls, const std::filesystem::path& path,
                                 std::int64_t most) {
  const File file(calls, path, Access::read);
  const std::int64_t bytes = file.bytes();
  if (bytes > most) {
    raise<FormatError>({.object = in_quotes(path.string()),
                        .expected = "at most " + std::to_string(most) + " bytes",
                        .found = std::to_string(bytes)});
  }
  std::vector<std::byte> data(static_cast<std::size_t>(bytes));
  file.read(data, 0);
  return data;
}

void sync_folder(SystemCalls& calls, const std::filesystem::path& path) {
  File(calls, path, Access::folder).sync();
}

}  // namespace mics::checkpoint
