// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>

#include <Kokkos_Core.hpp>

#include <cstddef>
#include <span>
#include <type_traits>

namespace mics::state {

/// A small table that kernels read: a copy in device memory, made once.
template <class T>
class DeviceTable {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  DeviceTable() = default;
  /// Local; blocks.
  explicit DeviceTable(std::span<const T> rows)
      : rows_(Kokkos::view_alloc(Kokkos::WithoutInitializing, "mics::state::DeviceTable"),
              rows.size()) {
    const Execution exec;
    device::copy(exec, rows_.data(), rows.data(), static_cast<std::int64_t>(rows.size_bytes()));
    exec.fence("mics::state::DeviceTable: the table is there");
  }

  /// Rows in device memory: the host must not read them where the two are separate.
  [[nodiscard]] std::span<const T> rows() const { return {rows_.data(), rows_.size()}; }

 private:
  Kokkos::View<T*, device::MemorySpace> rows_;
};

}  // namespace mics::state
