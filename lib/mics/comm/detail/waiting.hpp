// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <cstddef>

/// What waits for other ranks have in common, whichever memory they move.
namespace mics::comm::detail {

/// Looking for failures and at the clock costs more than looking for what is waited for.
inline constexpr int polls_between_checks = 64;
/// Longer than a busy machine keeps a process from running: it was suspended, and cannot tell how
/// late others were.
inline constexpr std::chrono::milliseconds absence{500};
/// Ranks that a message about missing ones names.
inline constexpr std::size_t max_asked = 16;

}  // namespace mics::comm::detail
