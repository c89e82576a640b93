// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <string>

namespace mics::test {

/// Counts the calls of this process that allocate or free memory of the device or pinned memory,
/// that make the host wait for the device, and asynchronous copies of pageable memory, which do:
/// those of the run-time library and of the driver, whichever library makes them, NCCL included.
/// An allocation of 0 bytes is none.
/// CUPTI tells of them. One object at a time; a debugger or profiler may hold CUPTI instead.
class CudaCalls {
 public:
  /// \throws std::runtime_error if CUPTI refuses
  CudaCalls();
  ~CudaCalls();
  CudaCalls(const CudaCalls&) = delete;
  CudaCalls& operator=(const CudaCalls&) = delete;

  /// How often each was called since the beginning or the last call of this.
  [[nodiscard]] std::map<std::string, std::int64_t> take();
};

}  // namespace mics::test
