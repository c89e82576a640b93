// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>

#include <cstddef>
#include <span>
#include <vector>

namespace mics::checkpoint::detail {

/// Every rank's bytes, in the order of ranks; none but on rank 0. Collective over `world`; blocks.
/// At most 2 GiB a rank.
[[nodiscard]] std::vector<std::vector<std::byte>> gather(const comm::Communicator& world,
                                                         std::span<const std::byte> mine);

}  // namespace mics::checkpoint::detail
