// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/communicator.hpp>

#include <chrono>
#include <cstdint>
#include <string_view>
#include <vector>

namespace mics::apps {

/// Decides which of the ranks that end with an error prints it: of those with the same text the
/// lowest. An error is always printed by someone, and nobody waits longer than the limits for a
/// rank that says nothing.
///
/// Each rank that ends says so to all others in small messages, without a collective: that it has
/// an error of its own (a hash of its text), or only heard of another's; and later that it is done.
/// Launchers end a job with its first rank: so a rank leaves when all others are done too.
class LastWords {
 public:
  using Milliseconds = std::chrono::milliseconds;

  /// Collective over `world`; blocks. Made before anything can fail, since then it is too late.
  explicit LastWords(MPI_Comm world);
  /// Frees the communicator, collective over it, unless something was said.
  ~LastWords();
  LastWords(const LastWords&) = delete;
  LastWords& operator=(const LastWords&) = delete;

  /// Says that this rank has an error of its own. True if this rank is to print it: no lower rank
  /// has the same. Waits until all lower ranks have said what they have, at most `limit`. Local.
  [[nodiscard]] bool should_print(std::string_view text, Milliseconds limit = Milliseconds(1000));

  /// Says that this rank only heard of an error, which another rank prints. Local; waits for none.
  void heard();

  /// Says that this rank has printed what it had to, and waits until all ranks have said so, at
  /// most `limit`. Local.
  void wait_for_others(Milliseconds limit = Milliseconds(2000));

 private:
  enum class Kind : std::uint64_t { silent, heard, error, done };
  struct Message {
    std::uint64_t kind = 0;
    std::uint64_t hash = 0;
  };
  struct Peer {
    Kind first = Kind::silent;  // what it said at its end
    std::uint64_t hash = 0;     // of its error's text
    bool is_done = false;
  };
  void tell(Kind kind, std::uint64_t hash);
  void listen();
  template <class Ready>
  void wait(Milliseconds limit, const Ready& ready);

  comm::Communicator comm_;
  std::vector<Peer> peers_;
  Message said_[2];  // MPI reads them until the process ends
  int said_count_ = 0;
};

}  // namespace mics::apps
