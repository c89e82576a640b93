// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <string>
#include <thread>

namespace mics::comm {

/// Watches one stretch of code whose calls of MPI cannot be given up: making and freeing
/// communicators, which every rank must take part in. Everything else waits in loops of its own.
/// \see MpiTransport
///
/// From construction to destruction a thread waits for the end of the stretch; if it does not come
/// in time, the thread calls `on_stuck` once, with one line, and goes on waiting. It never calls
/// MPI.
class Watchdog {
 public:
  /// Local. \param what  `construction of the engine on rank 3`
  Watchdog(std::string what, std::chrono::milliseconds timeout,
           std::function<void(const std::string&)> on_stuck);
  ~Watchdog();
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  /// What the stretch does now, for the message. Local.
  void stage(std::string stage);

 private:
  void watch();

  std::string what_;
  std::chrono::milliseconds timeout_;
  std::function<void(const std::string&)> on_stuck_;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::string stage_;
  bool done_ = false;
  std::thread thread_;
};

}  // namespace mics::comm
