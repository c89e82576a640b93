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

constexpr std::int64_t large_page = std::int64_t{2} << 20;

// Where an arena of `bytes` bytes starts: large ones with a large page.
std::int64_t alignment_of(std::int64_t bytes) {
  return bytes >= large_page ? large_page : arena_alignment;
}

// Asks for pages of 2 MiB before the first touch: copies between processes and passes over memory
// then spend less time in page tables. What the process used before has its small pages, and its
// place among the memories of the machine, from then: it is given back, so that a later engine is
// as fast as the first one. A wish: any answer is fine.
void prefer_large_pages([[maybe_unused]] std::byte* data, [[maybe_unused]] std::int64_t bytes) {
#ifdef __linux__
  const std::int64_t length = bytes / large_page * large_page;
  if (length == 0) return;
  madvise(data, static_cast<std::size_t>(length), MADV_HUGEPAGE);
  madvise(data, static_cast<std::size_t>(length), MADV_DONTNEED);
#endif
}

}  // namespace

Arena::Arena(std::int64_t bytes, Memory memory) : bytes_(bytes) {
  const std::int64_t alignment = memory == Memory::host ? alignment_of(bytes) : arena_alignment;
  const auto size = static_cast<std::size_t>(bytes + alignment);
  const auto properties = Kokkos::view_alloc(Kokkos::WithoutInitializing, "mics::state::Arena");
  if (memory == Memory::host) {
    storage_.host = decltype(storage_.host)(properties, size);
    base_ = storage_.host.data();
  } else {
    storage_.device = decltype(storage_.device)(properties, size);
    base_ = storage_.device.data();
  }
  const auto address = static_cast<std::int64_t>(std::bit_cast<std::uintptr_t>(base_));
  base_ += (address + alignment - 1) / alignment * alignment - address;
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
