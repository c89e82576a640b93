// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>

#include <Kokkos_Core.hpp>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace mics::state {

/// Every region starts at a multiple of this many bytes.
inline constexpr std::int64_t arena_alignment = 256;

/// Bytes that a region of `bytes` bytes takes in the arena.
[[nodiscard]] constexpr std::int64_t arena_bytes(std::int64_t bytes) {
  return (bytes + arena_alignment - 1) / arena_alignment * arena_alignment;
}

/// The one allocation that holds an engine's state and slots; regions are handed out once and live
/// as long as the arena. Zero at the start. Local.
class Arena {
 public:
  /// Allocates and clears `bytes` bytes; those of the host are touched by the threads that will use
  /// them. Blocks. \throws Kokkos' exception if the memory is not there.
  explicit Arena(std::int64_t bytes, Memory memory = Memory::host);

  /// The next `bytes` bytes. \throws StateError if the plan did not foresee them.
  [[nodiscard]] std::byte* take(std::int64_t bytes, std::string_view what);

  [[nodiscard]] std::int64_t bytes() const { return bytes_; }
  [[nodiscard]] std::int64_t used() const { return used_; }
  /// Keeps the memory for the rest of the process: after a failure other ranks may still read it.
  void leak() {
    static auto* const kept = new std::vector<Storage>;  // reachable: leak checkers see intent
    kept->push_back(storage_);
  }

 private:
  struct Storage {
    Kokkos::View<std::byte*, Kokkos::HostSpace> host;
    Kokkos::View<std::byte*, device::MemorySpace> device;
  };
  Storage storage_;
  std::byte* base_ = nullptr;
  std::int64_t bytes_ = 0;
  std::int64_t used_ = 0;
};

}  // namespace mics::state
