// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/vendor.hpp>

#include <array>
#include <cstring>

namespace mics::device {

void require_capability(int compiled, int found, const std::string& device) {
  if (compiled <= found) return;
  const auto text = [](int capability) {
    return std::to_string(capability / 10) + '.' + std::to_string(capability % 10);
  };
  raise<DeviceError>(
      {.object = device,
       .expected =
           "compute capability " + text(compiled) + ", which Kokkos was built for, or newer",
       .found = text(found),
       .remedy = "build Kokkos and mics for its architecture: cmake/cache has examples"});
}

#ifdef MICS_HAS_DEVICE

namespace {

auto stream_of(const Execution& exec) { return static_cast<MICS_VENDOR(Stream_t)>(exec.stream()); }

}  // namespace

void check(int status, std::string_view operation, std::source_location where) {
  if (status == static_cast<int>(MICS_VENDOR(Success))) return;
  const auto error = static_cast<MICS_VENDOR(Error_t)>(status);
  raise<DeviceError>({.object = std::string(operation),
                      .expected = "success",
                      .found = MICS_VENDOR(GetErrorString)(error)},
                     where);
}

void copy(const Execution& exec, void* to, const void* from, std::int64_t bytes) {
  if (bytes == 0) return;
  check(MICS_VENDOR(MemcpyAsync)(to, from, static_cast<std::size_t>(bytes),
                                 MICS_VENDOR(MemcpyDefault), stream_of(exec)),
        "copy of " + std::to_string(bytes) + " bytes");
}

void clear(const Execution& exec, void* data, std::int64_t bytes) {
  if (bytes == 0) return;
  check(MICS_VENDOR(MemsetAsync)(data, 0, static_cast<std::size_t>(bytes), stream_of(exec)),
        "clearing of " + std::to_string(bytes) + " bytes");
}

void require_usable() {
  int count = 0;
  const auto status = MICS_VENDOR(GetDeviceCount)(&count);
  if (status != MICS_VENDOR(Success) || count == 0) {
    raise<DeviceError>({.object = "devices of this process",
                        .expected = "at least one",
                        .found = status == MICS_VENDOR(Success)
                                     ? std::string("none")
                                     : "none: " + std::string(MICS_VENDOR(GetErrorString)(status)),
                        .remedy = "look at CUDA_VISIBLE_DEVICES and the driver, or use a mics that "
                                  "was built for the host"});
  }
#ifdef KOKKOS_IMPL_ARCH_NVIDIA_GPU
  for (int device = 0; device < count; ++device) {
    int major = 0;
    int minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
          "compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device),
          "compute capability");
    require_capability(KOKKOS_IMPL_ARCH_NVIDIA_GPU, 10 * major + minor,
                       "device " + std::to_string(device));
  }
#endif
}

Execution make_instance(bool urgent) {
  int lowest = 0;
  int highest = 0;
  check(MICS_VENDOR(DeviceGetStreamPriorityRange)(&lowest, &highest), "priorities of streams");
  MICS_VENDOR(Stream_t) stream = nullptr;
  check(MICS_VENDOR(StreamCreateWithPriority)(&stream, MICS_VENDOR(StreamNonBlocking),
                                              urgent ? highest : lowest),
        "creation of a stream");
  return Execution(Space(stream, Kokkos::Impl::ManageStream::yes));
}

Capacity capacity() {
  std::size_t free = 0;
  std::size_t total = 0;
  check(MICS_VENDOR(MemGetInfo)(&free, &total), "size of the device's memory");
  return {static_cast<std::int64_t>(free), static_cast<std::int64_t>(total)};
}

std::string identity() {
  int device = 0;
  check(MICS_VENDOR(GetDevice)(&device), "current device");
  std::array<char, 32> address{};
  check(MICS_VENDOR(DeviceGetPCIBusId)(address.data(), static_cast<int>(address.size()), device),
        "bus address of the device");
  return address.data();
}

#else

void require_usable() {}

void check(int /*status*/, std::string_view /*operation*/, std::source_location /*where*/) {}

void copy(const Execution& exec, void* to, const void* from, std::int64_t bytes) {
  exec.fence("mics::device::copy");
  if (bytes > 0) std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

void clear(const Execution& exec, void* data, std::int64_t bytes) {
  exec.fence("mics::device::clear");
  if (bytes > 0) std::memset(data, 0, static_cast<std::size_t>(bytes));
}

Execution make_instance(bool /*urgent*/) { return Execution(Space()); }

Capacity capacity() { return {INT64_MAX, INT64_MAX}; }

std::string identity() { return {}; }

#endif

}  // namespace mics::device
