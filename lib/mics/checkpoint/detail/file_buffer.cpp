// SPDX-License-Identifier: Apache-2.0
#include <mics/checkpoint/detail/file_buffer.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/layout/interval.hpp>

#include <sys/mman.h>

#include <algorithm>
#include <new>

namespace mics::checkpoint::detail {

FileBuffer make_file_buffer(std::int64_t bytes) {
  constexpr std::int64_t large_page = std::int64_t{2} << 20;
  const std::int64_t page = bytes < large_page ? direct_alignment : large_page;
  const auto size =
      static_cast<std::size_t>(layout::round_up(std::max<std::int64_t>(bytes, 1), page));
  FileBuffer memory(
      static_cast<std::byte*>(std::aligned_alloc(static_cast<std::size_t>(page), size)));
  if (!memory) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  // A wish: any answer is fine.
  if (page == large_page) ::madvise(memory.get(), size, MADV_HUGEPAGE);
#endif
  return memory;
}

}  // namespace mics::checkpoint::detail
