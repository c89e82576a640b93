// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/state/arena.hpp>
#include <mics/state/for_blocks.hpp>

#include <bit>
#include <string>

namespace mics::state {

Arena::Arena(std::int64_t bytes)
    : storage_(Kokkos::view_alloc(Kokkos::WithoutInitializing, "mics::state::Arena"),
               static_cast<std::size_t>(bytes + arena_alignment)),
      bytes_(bytes) {
  const auto address = std::bit_cast<std::uintptr_t>(storage_.data());
  const auto misaligned = static_cast<std::int64_t>(address % arena_alignment);
  base_ = storage_.data() + (misaligned == 0 ? 0 : arena_alignment - misaligned);
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
