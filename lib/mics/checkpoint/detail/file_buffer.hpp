// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

namespace mics::checkpoint::detail {

struct FreeMemory {
  void operator()(std::byte* memory) const { std::free(memory); }
};
/// Memory that files are written from and read into.
using FileBuffer = std::unique_ptr<std::byte, FreeMemory>;

/// Uninitialized memory at a multiple of direct_alignment and, from 2 MiB on, on large pages: a
/// disk then gets one request where it would get many, as each names a few runs of pages only.
/// \throws std::bad_alloc
[[nodiscard]] FileBuffer make_file_buffer(std::int64_t bytes);

}  // namespace mics::checkpoint::detail
