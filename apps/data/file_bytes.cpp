// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>

#include <data/file_bytes.hpp>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <system_error>
#include <utility>

namespace data {
namespace {

/// A file descriptor that is closed at the end of its scope.
class Descriptor {
 public:
  explicit Descriptor(const std::filesystem::path& path)
      : number_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~Descriptor() {
    if (number_ >= 0) close(number_);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  [[nodiscard]] int number() const { return number_; }

 private:
  int number_;
};

[[noreturn]] void refuse(const std::filesystem::path& path, const std::string& found) {
  mics::raise<mics::ArgumentError>({.object = path.string(),
                                    .expected = "a readable file",
                                    .found = found,
                                    .remedy = "check its permissions"});
}

}  // namespace

FileBytes::FileBytes(const std::filesystem::path& path) {
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (!error && size >= mapped_from) {
    const Descriptor file(path);
    if (file.number() < 0) refuse(path, std::generic_category().message(errno));
    // The size of the file that is open, which another may have replaced meanwhile.
    struct stat facts {};
    if (fstat(file.number(), &facts) != 0) refuse(path, std::generic_category().message(errno));
    const auto length = static_cast<std::size_t>(facts.st_size);
    if (length > 0) {
      void* memory = mmap(nullptr, length, PROT_READ, MAP_SHARED, file.number(), 0);
      if (memory == MAP_FAILED) refuse(path, std::generic_category().message(errno));
      mapping_ = memory;
      bytes_ = {static_cast<const std::byte*>(memory), length};
    }
    return;
  }
  // What the file system says of the size of a special file may be less than it holds.
  std::ifstream stream(path, std::ios::binary);
  if (!error) copy_.reserve(size);
  char chunk[1 << 16];
  while (stream) {
    stream.read(chunk, sizeof chunk);
    const auto* begin = reinterpret_cast<const std::byte*>(chunk);
    copy_.insert(copy_.end(), begin, begin + stream.gcount());
  }
  if (!stream.eof()) refuse(path, "an error on opening or reading");
  bytes_ = copy_;
}

FileBytes::FileBytes(FileBytes&& other) noexcept
    : bytes_(std::exchange(other.bytes_, {})),
      copy_(std::move(other.copy_)),
      mapping_(std::exchange(other.mapping_, nullptr)) {
  // The memory of a copy moves with its vector.
  if (mapping_ == nullptr) bytes_ = copy_;
}

FileBytes::~FileBytes() {
  if (mapping_ != nullptr) munmap(mapping_, bytes_.size());
}

}  // namespace data
