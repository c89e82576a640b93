// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Core.hpp>

#include <algorithm>
#include <cstdint>
#include <string>

namespace mics {

/// Calls `body(begin, end)` for the blocks of [0, count), `block` numbers each, the last one
/// perhaps fewer, on all of the host's threads where there are several. A block is the same
/// whatever their number. Local; blocks until all are done, and waits for nothing else.
template <class Body>
void for_host_blocks(const std::string& label, std::int64_t count, std::int64_t block,
                     const Body& body) {
  using Host = Kokkos::DefaultHostExecutionSpace;
  const std::int64_t blocks = (count + block - 1) / block;
  const auto one = [=](std::int64_t b) { body(b * block, std::min(count, (b + 1) * block)); };
  if (blocks > 1 && Host().concurrency() > 1) {
    Kokkos::parallel_for(label, Kokkos::RangePolicy<Host>(0, blocks), one);
    Host().fence(label + ": blocks are complete");
  } else {
    for (std::int64_t b = 0; b < blocks; ++b) one(b);
  }
}

}  // namespace mics
