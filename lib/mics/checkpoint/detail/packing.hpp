// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/error.hpp>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace mics::checkpoint::detail {

/// Puts numbers and vectors of numbers end to end, for messages between ranks of one job.
class Packer {
 public:
  template <class T>
  requires std::is_arithmetic_v<T>
  void put(T value) { append(&value, sizeof(value)); }
  template <class T>
  requires std::is_arithmetic_v<T>
  void put(const std::vector<T>& values) {
    put(static_cast<std::uint64_t>(values.size()));
    append(values.data(), values.size() * sizeof(T));
  }
  [[nodiscard]] std::span<const std::byte> bytes() const { return bytes_; }

 private:
  void append(const void* data, std::size_t bytes) {
    const auto* const from = static_cast<const std::byte*>(data);
    bytes_.insert(bytes_.end(), from, from + bytes);
  }
  std::vector<std::byte> bytes_;
};

/// Takes apart, in the same order, what a Packer put. \throws ArgumentError at the end
class Unpacker {
 public:
  explicit Unpacker(std::span<const std::byte> bytes) : rest_(bytes) {}

  template <class T>
  requires std::is_arithmetic_v<T> T get() {
    T value{};
    get(value);
    return value;
  }
  template <class T>
  requires std::is_arithmetic_v<T>
  void get(T& value) { take(&value, sizeof(value)); }
  template <class T>
  requires std::is_arithmetic_v<T>
  void get(std::vector<T>& values) {
    const auto count = get<std::uint64_t>();
    if (count > rest_.size() / sizeof(T)) take(nullptr, rest_.size() + 1);
    values.resize(count);
    take(values.data(), count * sizeof(T));
  }

 private:
  void take(void* to, std::size_t bytes) {
    if (bytes > rest_.size()) {
      raise<ArgumentError>({.object = "message between ranks",
                            .expected = std::to_string(bytes) + " more bytes",
                            .found = std::to_string(rest_.size())});
    }
    if (bytes != 0) std::memcpy(to, rest_.data(), bytes);
    rest_ = rest_.subspan(bytes);
  }
  std::span<const std::byte> rest_;
};

}  // namespace mics::checkpoint::detail
