// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <csignal>
#include <future>
#include <utility>

namespace mics::comm {

/// Blocks all signals that can wait on the calling thread, and on those that it starts: handlers
/// of the application never run there, and a write beyond RLIMIT_FSIZE fails with EFBIG instead of
/// ending the process. Local.
void block_signals() noexcept;

/// Runs `action` on a thread of its own with its signals blocked. The future waits for it when it
/// goes. Local. \throws std::system_error if there can be no more threads
template <class Action>
[[nodiscard]] auto on_helper_thread(Action&& action) {
  return std::async(std::launch::async, [action = std::forward<Action>(action)]() mutable {
    block_signals();
    return action();
  });
}

}  // namespace mics::comm
