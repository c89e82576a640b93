// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/execution.hpp>
#include <mics/comm/failure_channel.hpp>
#include <mics/comm/operation_log.hpp>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace mics::comm {

/// Knows the collectives that an engine has under way on its device, and ends those that never end
/// by themselves. Shared by all transports of device memory of one engine; outlives them.
///
/// A collective is late when it has been running for longer than the time limit: time counts from
/// the moment at which the work before it in its stream was done and the device could start it.
/// How long it waits behind an application's kernels here does not count; how long other ranks'
/// kernels keep them from joining does, as on host memory.
///
///  - The host waits in `wait`, which looks for failures of other ranks, errors of the
///    communicators and late collectives, and throws what it finds.
///  - An application that waits in a call of its own is released by a thread, which exists while
///    there are communicators: if a collective is late by more than a sixteenth of the limit, a
///    second at most, it aborts all of them, and the next call of mics throws. The thread never
///    calls MPI.
///
/// After an abort every call throws; nothing that was under way becomes available.
class DeviceWatch {
 public:
  /// A communicator of the device, without its type.
  struct Member {
    std::vector<int> ranks;       ///< of the group, as the engine's caller knows them
    std::function<void()> abort;  ///< ends its collectives, from any thread; may wait for them
    std::function<std::string()> error;  ///< what went wrong in it meanwhile; empty: nothing
  };
  /// Whether the work before an operation (`end` false) or its own is done; never blocks.
  using Probe = std::function<bool(const Marker&, const Operation&, bool end)>;

  /// Local. The failure channel and the log outlive the watch.
  /// \param probe  for tests without a device; default: Marker::done
  DeviceWatch(FailureChannel& failures, const OperationLog& log, std::chrono::milliseconds timeout,
              Probe probe = {});
  ~DeviceWatch();
  DeviceWatch(const DeviceWatch&) = delete;
  DeviceWatch& operator=(const DeviceWatch&) = delete;

  /// Watches a communicator from now on; returns its number for the other calls. Local.
  [[nodiscard]] int add(Member member);
  /// Forgets it. Local; waits for an abort that is under way.
  void remove(int member);

  /// An operation was given to the device. Local, does not block. Operations of one member run in
  /// the order of these calls.
  /// \param before  it can begin when all of them are done; at least one
  /// \param after   the mark of its stream behind it
  void record(int member, const Operation& operation, std::vector<Marker> before, Marker after);

  /// Throws what has gone wrong here or on another rank. Local; does not block while nothing has.
  /// \throws CommError
  void check();

  /// Blocks the host until the marker's work is done, or something goes wrong.
  /// \throws CommError that names this rank, its unfinished operation and what the other ranks of
  /// its group say that they wait for
  void wait(const Marker& marker);

  /// Ends all collectives of this rank on the device. From any thread; later calls throw. Blocks
  /// until they have ended, for some seconds at most.
  void abort_all() noexcept;
  [[nodiscard]] bool aborted() const noexcept { return aborted_; }

  /// Operations that are not known to be finished. Local.
  [[nodiscard]] std::size_t in_flight() const;

 private:
  using Clock = std::chrono::steady_clock;
  struct InFlight {
    Operation operation;
    std::vector<Marker> before;
    Marker after;
    std::optional<Clock::duration> began;  // on the clock of this class
  };
  struct Late {
    Operation operation;
    std::vector<int> ranks;
    Clock::duration age{};
  };

  void watch();
  // The operation that has been running for longest, of those that have for `limit`.
  [[nodiscard]] std::optional<Late> oldest(Clock::duration limit);
  [[nodiscard]] Clock::duration now();
  [[nodiscard]] std::string async_error() const;
  [[nodiscard]] std::string text(const Late& late, const std::vector<int>& asked) const;
  // Asks the others of the group what they wait for; returns whom.
  std::vector<int> ask(const Late& late);
  [[noreturn]] void fail(const std::string& line);
  [[noreturn]] void report_expired();

  FailureChannel& failures_;
  const OperationLog& log_;
  std::chrono::milliseconds timeout_;
  Probe probe_;
  int device_ = 0;
  std::atomic<bool> aborted_ = false;
  std::atomic<bool> expired_ = false;

  mutable std::mutex mutex_;  // of what follows
  std::map<int, std::deque<InFlight>> in_flight_;
  Clock::time_point last_look_;
  Clock::duration clock_{};  // without the times in which this process did not run
  std::optional<Late> late_;
  std::condition_variable stopped_;
  bool stop_ = false;

  mutable std::mutex members_mutex_;  // taken before the other one where both are
  std::map<int, Member> members_;
  int next_member_ = 0;
  std::thread thread_;
};

}  // namespace mics::comm
