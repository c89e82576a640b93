// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>
#include <mics/comm/helper_thread.hpp>
#include <mics/comm/transport.hpp>

#include <chrono>
#include <cstddef>
#include <exception>
#include <future>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace mics::comm {

/// Runs `action` on every rank; if it threw on any, throws on all of them: the exception of the
/// lowest failing rank, on other ranks as an error of the same class with the same text.
///
/// Collective over `comm`; blocks until all ranks have run the action. A local throw in front of a
/// collective would leave the other ranks waiting: this is the way to check things that can differ
/// between ranks (a file, a deck, memory). Cost: one all-reduce of 4 bytes.
///
/// A rank that ends instead leaves the others inside MPI. The functions that take a transport do
/// not: they throw CommError on the ranks that live.
template <class Action>
void agree(const Communicator& comm, Action&& action);

/// Throws ArgumentError on every rank if the bytes differ between ranks, naming the first rank that
/// differs from rank 0. `what` says what is compared. Collective over `comm`; blocks.
void require_same(const Communicator& comm, std::string_view bytes, std::string_view what);

/// As above, over a transport. The action must end within the transport's time limit. Cost: one
/// exchange of 1 byte a rank.
/// \param what  for messages; a literal, the same on every rank
/// \throws CommError if a rank is gone or late
template <class Action>
void agree(Transport& group, std::string_view what, Action&& action);

/// As above, over a transport.
void require_same(Transport& group, std::string_view bytes, std::string_view what);

/// Gives all ranks the root's bytes, of any number. Collective over `group`; blocks.
/// \throws CommError
void broadcast(Transport& group, std::vector<std::byte>& bytes, int root, std::string_view what);

/// Whether `mine` is true on all ranks. Collective over `group`; blocks for one exchange of 1 byte
/// a rank. \throws CommError
[[nodiscard]] bool all_of(Transport& group, bool mine, std::string_view what);

/// Returns when the futures of all ranks are ready, however long that takes: ranks that wait meet
/// every few milliseconds, so that only one which is gone or stopped is missed. A future without a
/// state is ready. Collective over `group`; blocks. \throws CommError
template <class T>
void wait_for_all(Transport& group, const std::future<T>& mine, std::string_view what);

/// agree() for an action that waits for a disk and may take any time: it runs on a helper thread,
/// where it must not call MPI. Collective over `group`; blocks. \throws as agree()
template <class Action>
void agree_patiently(Transport& group, std::string_view what, Action&& action);

namespace detail {
void agree_on(const Communicator& comm, std::exception_ptr local);
void agree_on(Transport& group, std::string_view what, std::exception_ptr local);
// The pause before meeting number `round` of ranks that wait.
std::chrono::microseconds pause_before(int round);

template <class Action>
std::exception_ptr caught(Action&& action) {
  try {
    std::forward<Action>(action)();
  } catch (...) {
    return std::current_exception();
  }
  return {};
}
}  // namespace detail

template <class Action>
void agree(const Communicator& comm, Action&& action) {
  detail::agree_on(comm, detail::caught(std::forward<Action>(action)));
}

template <class Action>
void agree(Transport& group, std::string_view what, Action&& action) {
  detail::agree_on(group, what, detail::caught(std::forward<Action>(action)));
}

template <class T>
void wait_for_all(Transport& group, const std::future<T>& mine, std::string_view what) {
  if (group.size() == 1) {
    if (mine.valid()) mine.wait();
    return;
  }
  // All ranks pause for the same time after they met, so that none waits actively for another.
  for (int round = 0;; ++round) {
    const bool ready =
        !mine.valid() || mine.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
    if (all_of(group, ready, what)) return;
    std::this_thread::sleep_for(detail::pause_before(round));
  }
}

template <class Action>
void agree_patiently(Transport& group, std::string_view what, Action&& action) {
  std::future<void> done;
  const std::exception_ptr unable =
      detail::caught([&] { done = on_helper_thread([&action] { action(); }); });
  wait_for_all(group, done, what);
  detail::agree_on(group, what, unable ? unable : detail::caught([&] { done.get(); }));
}

}  // namespace mics::comm
