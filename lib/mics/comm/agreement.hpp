// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>

#include <exception>
#include <span>
#include <string>
#include <string_view>

namespace mics::comm {

/// Runs `action` on every rank; if it threw on any, throws on all of them: the exception of the
/// lowest failing rank, on other ranks as an error of the same class with the same text.
///
/// Collective over `comm`; blocks until all ranks have run the action. A local throw in front of a
/// collective would leave the other ranks waiting: this is the way to check things that can differ
/// between ranks (a file, a deck, memory). Cost: one all-reduce of 4 bytes.
template <class Action>
void agree(const Communicator& comm, Action&& action);

/// Throws ArgumentError on every rank if the bytes differ between ranks, naming the first rank that
/// differs from rank 0. `what` says what is compared. Collective over `comm`; blocks.
void require_same(const Communicator& comm, std::string_view bytes, std::string_view what);

namespace detail {
void agree_on(const Communicator& comm, std::exception_ptr local);
}  // namespace detail

template <class Action>
void agree(const Communicator& comm, Action&& action) {
  std::exception_ptr error;
  try {
    action();
  } catch (...) {
    error = std::current_exception();
  }
  detail::agree_on(comm, error);
}

}  // namespace mics::comm
