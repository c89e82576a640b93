// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <mpi.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

namespace mics::test {

/// Ends the job when a test takes longer than its limit, and says which test and which rank.
///
/// A collective that one rank never enters would otherwise hang until CTest's timeout, which names
/// neither. The limit is MICS_TEST_TIMEOUT seconds a test, 60 by default.
class Watchdog : public testing::EmptyTestEventListener {
 public:
  explicit Watchdog(int rank) : rank_(rank), limit_(limit_from_environment()) {}

  ~Watchdog() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_one();
    thread_.join();
  }
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  void OnTestStart(const testing::TestInfo& test) override {
    {
      const std::lock_guard lock(mutex_);
      test_ = std::string(test.test_suite_name()) + "." + test.name();
      deadline_ = Clock::now() + limit_;
    }
    changed_.notify_one();
  }

  void OnTestEnd(const testing::TestInfo& /*test*/) override {
    const std::lock_guard lock(mutex_);
    deadline_.reset();
  }

 private:
  using Clock = std::chrono::steady_clock;

  static std::chrono::duration<double> default_limit() { return std::chrono::seconds(60); }

  static Clock::duration limit_from_environment() {
    auto limit = default_limit();
    if (const char* text = std::getenv("MICS_TEST_TIMEOUT"); text != nullptr) {
      const double seconds = std::strtod(text, nullptr);
      if (seconds > 0) limit = std::chrono::duration<double>(seconds);
    }
    return std::chrono::duration_cast<Clock::duration>(limit);
  }

  void watch() {
    std::unique_lock lock(mutex_);
    while (!stopping_) {
      if (!deadline_) {
        changed_.wait(lock);
      } else if (Clock::now() < *deadline_) {
        // A copy: the member may change while the lock is given up.
        const auto deadline = *deadline_;
        changed_.wait_until(lock, deadline);
      } else {
        end_job();
      }
    }
  }

  [[noreturn]] void end_job() {
    std::fprintf(stderr, "[rank %d] TIMEOUT %s took longer than %.0f s\n", rank_, test_.c_str(),
                 std::chrono::duration<double>(limit_).count());
    std::fflush(nullptr);
    // MPI_Abort may wait for a lock that the hanging thread holds; the alarm then ends this
    // process, and the launcher the others.
    alarm(10);
    MPI_Abort(MPI_COMM_WORLD, exit_status);
    _exit(exit_status);
  }

  static constexpr int exit_status = 86;  // unlike GoogleTest's 1: tells a hang from a failure

  const int rank_;
  const Clock::duration limit_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::string test_;                           // guarded by mutex_
  std::optional<Clock::time_point> deadline_;  // guarded by mutex_; empty between tests
  bool stopping_ = false;                      // guarded by mutex_
  std::thread thread_{[this] { watch(); }};    // last: it reads the members above
};

}  // namespace mics::test
