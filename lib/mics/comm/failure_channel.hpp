// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>
#include <mics/comm/operation_log.hpp>

#include <chrono>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace mics::comm {

/// What a rank that cannot go on says of itself.
enum class FailureKind : std::uint8_t {
  cause,         ///< an error of its own
  text_follows,  ///< the same, with a better text under way: an exception is unwinding
  consequence,   ///< it missed another rank
};

/// Tells all ranks of an engine that one of them cannot go on, without a collective.
///
/// A rank that fails sends one point-to-point message to every other; ranks look for such a message
/// whenever they wait for communication, so nobody waits for a rank that will not come. After the
/// first failure, own or received, the channel stays failed and every later wait throws. Where
/// several ranks fail at about the same time, all of them blame the same one: the lowest that
/// failed by itself, else the lowest that missed another.
///
/// A rank that has waited for long may also ask the ones it misses what they wait for themselves:
/// they answer from inside their own waits, so that silence means stopped, gone or busy elsewhere.
class FailureChannel {
 public:
  /// Collective over `parent`; blocks.
  explicit FailureChannel(const Communicator& parent);
  /// Local; on a failed channel the communicator is abandoned, because freeing it is collective.
  ~FailureChannel();
  FailureChannel(const FailureChannel&) = delete;
  FailureChannel& operator=(const FailureChannel&) = delete;

  /// Tells the others that this rank failed. Local, does not block, never throws; only the first
  /// text is sent, except that one which was announced with `text_follows` replaces it.
  void fail(const std::string& text, FailureKind kind = FailureKind::cause) noexcept;

  /// Throws CommError if this or another rank has failed. Local; does not block while nobody has
  /// failed, then for the moment in which other failures, or a text that follows, may arrive.
  void poll();

  /// Calls `action` once, with the first failure that this rank has or hears of, on the thread that
  /// does. Local.
  void on_failure(std::function<void()> action) { on_failure_ = std::move(action); }

  /// What this rank waits for from now on, and for which ranks, for answers; null: nothing. Local.
  void wait_for(const Operation* operation, std::function<std::vector<int>()> whom = {}) noexcept {
    waiting_ = operation;
    whom_ = std::move(whom);
  }
  /// Asks `rank` what it waits for. Local, does not block.
  void ask(int rank) noexcept {
    answers_.erase(rank);
    send(rank, 'q', {});
  }
  struct Answer {
    std::string operation;  ///< `hop 1 of layer0 (4096 bytes)`, or `nothing`
    std::vector<int> whom;  ///< ranks that it waits for
  };
  /// What `rank` said last; null if it has not answered. Local.
  [[nodiscard]] const Answer* answer_of(int rank) const;
  /// The same in words: `rank 2 waits in hop 1 of layer0 (4096 bytes) for rank 3`. Local.
  [[nodiscard]] std::string answer_text(int rank) const;
  /// `rank 1, rank 2`; of many the first and how many more. Local.
  [[nodiscard]] static std::string names(const std::vector<int>& ranks);

  [[nodiscard]] bool failed() const noexcept { return !failures_.empty(); }
  /// What the failure said that is blamed; empty if there is none.
  [[nodiscard]] std::string text() const;
  /// The rank that is blamed, as far as this rank knows; -1 if none.
  [[nodiscard]] int failed_rank() const noexcept;
  [[nodiscard]] int rank() const noexcept { return comm_.rank(); }
  [[nodiscard]] MPI_Comm native() const noexcept { return comm_.native(); }

 private:
  struct Message {
    std::string bytes;
    MPI_Request request = MPI_REQUEST_NULL;
  };
  struct Failure {
    FailureKind kind = FailureKind::cause;
    std::string text;
  };
  void send(int peer, char kind, const std::string& text) noexcept;
  [[nodiscard]] std::string own_answer() const;
  // Handles one message; false if there is none.
  bool receive();
  void note(int rank, FailureKind kind, std::string text);
  [[nodiscard]] std::map<int, Failure>::const_iterator blamed() const;

  Communicator comm_;
  std::map<int, Failure> failures_;  // by rank
  std::chrono::steady_clock::time_point first_failure_;
  bool settled_ = false;
  std::function<void()> on_failure_;
  const Operation* waiting_ = nullptr;
  std::function<std::vector<int>()> whom_;
  std::map<int, Answer> answers_;
  std::list<Message> sent_;  // buffers live as long as MPI may read them
};

}  // namespace mics::comm
