// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>

#include <bench/raw_files.hpp>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <new>
#include <string>
#include <system_error>

namespace mics::apps::bench {
namespace {

constexpr std::int64_t block = 4096;  // of direct reads and writes
constexpr std::int64_t large_page = std::int64_t{2} << 20;

[[noreturn]] void fail(const std::string& what, const std::filesystem::path& path) {
  const int number = errno;
  raise<IoError>({.object = in_quotes(path.string()),
                  .expected = "to " + what,
                  .found = std::generic_category().message(number)});
}

class Descriptor {
 public:
  Descriptor(const std::filesystem::path& path, int flags)
      : number_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (number_ < 0) fail("open it", path);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() { ::close(number_); }
  [[nodiscard]] int number() const { return number_; }

 private:
  int number_;
};

}  // namespace

void FileBuffer::Free::operator()(std::byte* memory) const { std::free(memory); }

FileBuffer::FileBuffer(std::int64_t bytes)
    : bytes_((bytes + large_page - 1) / large_page * large_page) {
  const auto size = static_cast<std::size_t>(bytes_);
  memory_.reset(static_cast<std::byte*>(std::aligned_alloc(large_page, size)));
  if (!memory_) throw std::bad_alloc();
  madvise(memory_.get(), size, MADV_HUGEPAGE);  // a wish: any answer is fine
  std::uint64_t word = 1;
  for (std::byte& value : this->bytes()) {
    word = word * 6364136223846793005U + 1442695040888963407U;
    value = static_cast<std::byte>(word >> 56);
  }
}

bool can_bypass_cache(const std::filesystem::path& folder) {
  const std::filesystem::path probe = folder / ".direct";
  const int number = ::open(probe.c_str(), O_WRONLY | O_CREAT | O_DIRECT | O_CLOEXEC, 0666);
  if (number >= 0) ::close(number);
  ::unlink(probe.c_str());
  return number >= 0;
}

void write_raw(const std::filesystem::path& path, std::int64_t bytes, Cache cache,
               const FileBuffer& buffer) {
  const int direct = cache == Cache::past ? O_DIRECT : 0;
  const Descriptor file(path, O_WRONLY | O_CREAT | O_EXCL | direct);
  const std::int64_t padded = (bytes + block - 1) / block * block;
  if (::fallocate(file.number(), 0, 0, padded) != 0 && errno != EOPNOTSUPP) {
    fail("reserve its space", path);
  }
  const std::span<std::byte> from = buffer.bytes();
  for (std::int64_t done = 0; done < padded;) {
    const ssize_t more =
        ::pwrite(file.number(), from.data(),
                 static_cast<std::size_t>(std::min(std::ssize(from), padded - done)), done);
    if (more <= 0 || more % block != 0) fail("write it", path);
    done += more;
  }
  if (::fsync(file.number()) != 0) fail("fsync it", path);
}

void read_raw(const std::filesystem::path& path, Cache cache, const FileBuffer& buffer) {
  const Descriptor file(path, O_RDONLY | (cache == Cache::past ? O_DIRECT : 0));
  const std::span<std::byte> to = buffer.bytes();
  for (std::int64_t done = 0;;) {
    const ssize_t more = ::pread(file.number(), to.data(), to.size(), done);
    if (more < 0) fail("read it", path);
    done += more;
    if (more == 0 || more % block != 0) return;
  }
}

void make_cold(const std::filesystem::path& path) {
  const Descriptor file(path, O_RDONLY);
  const int number = ::posix_fadvise(file.number(), 0, 0, POSIX_FADV_DONTNEED);
  if (number != 0) {
    errno = number;
    fail("drop its pages", path);
  }
}

void settle(const std::filesystem::path& folder) {
  const Descriptor directory(folder, O_RDONLY | O_DIRECTORY);
  if (::syncfs(directory.number()) != 0) fail("settle", folder);
}

}  // namespace mics::apps::bench
