// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>

#include <list>
#include <string>
#include <vector>

namespace mics::comm {

/// Tells all ranks of an engine that one of them cannot go on, without a collective.
///
/// A rank that fails sends one point-to-point message to every other; ranks look for such a message
/// whenever they wait for communication, so nobody waits for a rank that will not come. After the
/// first failure, own or received, the channel stays failed and every later wait throws.
class FailureChannel {
 public:
  /// Collective over `parent`; blocks.
  explicit FailureChannel(const Communicator& parent);
  /// Local; on a failed channel the communicator is abandoned, because freeing it is collective.
  ~FailureChannel();
  FailureChannel(const FailureChannel&) = delete;
  FailureChannel& operator=(const FailureChannel&) = delete;

  /// Tells the others that this rank failed. Local, does not block, never throws; only the first
  /// text is sent. With `text_follows` the others wait a moment for a better text (an exception
  /// that is still unwinding has none yet), which a second call then sends.
  void fail(const std::string& text, bool text_follows = false) noexcept;

  /// Throws CommError if this or another rank has failed. Local, does not block, except for the
  /// moment in which a text follows.
  void poll();

  [[nodiscard]] bool failed() const noexcept { return failed_; }
  /// What the first failure said; empty if there is none.
  [[nodiscard]] const std::string& text() const noexcept { return text_; }
  /// The rank that failed first, as far as this rank knows; -1 if none.
  [[nodiscard]] int failed_rank() const noexcept { return failed_rank_; }
  [[nodiscard]] int rank() const noexcept { return comm_.rank(); }

 private:
  struct Message {
    std::string bytes;
    std::vector<MPI_Request> requests;
  };
  void send_to_all(char kind, const std::string& text) noexcept;
  bool receive(bool& text_follows);

  Communicator comm_;
  bool failed_ = false;
  bool text_pending_ = false;  // local: a generic text went out and a better one may follow
  int failed_rank_ = -1;
  std::string text_;
  std::list<Message> sent_;  // buffers live as long as MPI may read them
};

}  // namespace mics::comm
