// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/state/arena.hpp>
#include <mics/state/for_blocks.hpp>

#include <bit>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mics::state {
namespace {

// Asks for pages of 2 MiB before the first touch: copies between processes and passes over memory
// then spend less time in page tables. A wish: any answer is fine.
void prefer_large_pages([[maybe_unused]] std::byte* data, [[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
  constexpr std::int64_t large_page = std::int64_t{2} << 20;
  const auto address = static_cast<std::int64_t>(std::bit_cast<std::uintptr_t>(data));
  const std::int64_t begin = (address + large_page - 1) / large_page * large_page - address;
  const std::int64_t length = (bytes - begin) / large_page * large_page;
  if (length > 0) madvise(data + begin, static_cast<std::size_t>(length), MADV_HUGEPAGE);
#endif
}

}  // namespace

Arena::Arena(std::int64_t bytes, Memory memory) : bytes_(bytes) {
  const auto size = static_cast<std::size_t>(bytes + arena_alignment);
  const auto properties = Kokkos::view_alloc(Kokkos::WithoutInitializing, "mics::state::Arena");
  if (memory == Memory::host) {
    storage_.host = decltype(storage_.host)(properties, size);
    base_ = storage_.host.data();
  } else {
    storage_.device = decltype(storage_.device)(properties, size);
    base_ = storage_.device.data();
  }
  const auto misaligned =
      static_cast<std::int64_t>(std::bit_cast<std::uintptr_t>(base_) % arena_alignment);
  base_ += misaligned == 0 ? 0 : arena_alignment - misaligned;
  if (memory == Memory::host) {
    prefer_large_pages(base_, bytes);
    clear("mics::state::Arena::clear", base_, bytes);
  } else {
    const Execution exec;
    device::clear(exec, base_, bytes);
    exec.fence("mics::state::Arena: the arena is clear");
  }
}

std::byte* Arena::take(std::int64_t bytes, std::string_view what) {
  const std::int64_t taken = arena_bytes(bytes);
  if (used_ + taken > bytes_) {
    raise<StateError>({.object = "arena region " + in_quotes(what),
                       .expected = "at most " + std::to_string(bytes_ - used_) + " bytes left",
                       .found = std::to_string(taken),
                       .remedy = "the plan and the engine disagree: report this"});
  }
  std::byte* region = base_ + used_;
  used_ += taken;
  return region;
}

}  // namespace mics::state
