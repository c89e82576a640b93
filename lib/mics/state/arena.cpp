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

Arena::Arena(std::int64_t bytes)
    : storage_(Kokkos::view_alloc(Kokkos::WithoutInitializing, "mics::state::Arena"),
               static_cast<std::size_t>(bytes + alignment_of(bytes))),
      bytes_(bytes) {
  const std::int64_t alignment = alignment_of(bytes);
  const auto address = static_cast<std::int64_t>(std::bit_cast<std::uintptr_t>(storage_.data()));
  base_ = storage_.data() + (address + alignment - 1) / alignment * alignment - address;
  prefer_large_pages(base_, bytes);
  clear("mics::state::Arena::clear", base_, bytes);
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
