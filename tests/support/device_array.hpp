// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>

#include <Kokkos_Core.hpp>

#include <cstddef>
#include <cstdint>
#include <vector>

namespace mics::test {

/// A vector in device memory, `skipped` elements behind a boundary of the allocation.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(const std::vector<T>& values, std::size_t skipped = 0)
      : storage_("mics::test::DeviceArray", values.size() + skipped), skipped_(skipped) {
    set(values);
  }
  void set(const std::vector<T>& values) {
    const Execution exec;
    device::copy(exec, data(), values.data(), static_cast<std::int64_t>(values.size() * sizeof(T)));
    exec.fence("mics::test::DeviceArray::set");
  }
  [[nodiscard]] std::vector<T> get() const {
    std::vector<T> values(size());
    const Execution exec;
    device::copy(exec, values.data(), data(), static_cast<std::int64_t>(size() * sizeof(T)));
    exec.fence("mics::test::DeviceArray::get");
    return values;
  }
  [[nodiscard]] T* data() const { return storage_.data() + skipped_; }
  [[nodiscard]] std::size_t size() const { return storage_.size() - skipped_; }

 private:
  Kokkos::View<T*, device::MemorySpace> storage_;
  std::size_t skipped_ = 0;
};

}  // namespace mics::test
