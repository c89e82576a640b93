// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/execution.hpp>

#include <Kokkos_Core.hpp>

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>
#include <string_view>
#include <type_traits>

namespace mics {

/// Where an engine keeps its state: a run-time value that a deck chooses.
enum class Memory : std::uint8_t {
  host,    ///< the host's
  device,  ///< that of the default execution space, which a build without a device has on the host
};

/// `host` or `device`.
[[nodiscard]] constexpr std::string_view name(Memory memory) {
  return memory == Memory::host ? "host" : "device";
}

}  // namespace mics

/// The device of this build: the default execution space. In a build without one everything here
/// works on host memory and blocks, so that code written for a device runs, and is tested, there.
namespace mics::device {

using Space = Kokkos::DefaultExecutionSpace;
using MemorySpace = Space::memory_space;

/// True if the host cannot read the device's memory.
inline constexpr bool separate =
    !Kokkos::SpaceAccessibility<Kokkos::HostSpace, MemorySpace>::accessible;

/// Host memory that the device copies from and to without an intermediate copy, and reaches.
#ifdef KOKKOS_HAS_SHARED_HOST_PINNED_SPACE
using PinnedSpace = Kokkos::SharedHostPinnedSpace;
#else
using PinnedSpace = Kokkos::HostSpace;
#endif

/// Copies bytes between host (pinned, or the copy blocks) and device memory in either direction.
/// Ordered in `exec`, an instance of Space. Local; does not block on pinned or device memory.
void copy(const Execution& exec, void* to, const void* from, std::int64_t bytes);

/// Sets device memory to zero. Ordered in `exec`. Local; does not block.
void clear(const Execution& exec, void* data, std::int64_t bytes);

/// An instance of Space with a queue of its own; `urgent` work is scheduled before other work of
/// the device. Local; allocates.
[[nodiscard]] Execution make_instance(bool urgent);

/// Bytes of the device's memory that are free now, and in all. Local.
struct Capacity {
  std::int64_t free = 0;
  std::int64_t total = 0;
};
[[nodiscard]] Capacity capacity();

/// That this process sees a device, and that what was compiled runs on all that it sees. To be
/// called before Kokkos::initialize, which ends the process where it is not so. Local; takes no
/// memory of a device. \throws DeviceError
void require_usable();

/// That kernels compiled for compute capability `compiled` (90: 9.0) run on devices of capability
/// `found`: the same or a newer one. Local. \throws DeviceError that names both
void require_capability(int compiled, int found, const std::string& device);

/// Tells the devices of a job apart: the bus address, `0000:1b:00.0`; empty without a device.
[[nodiscard]] std::string identity();

/// \throws DeviceError with the vendor's own text if `status`, of its run-time calls, is no success
void check(int status, std::string_view operation,
           std::source_location where = std::source_location::current());

}  // namespace mics::device
