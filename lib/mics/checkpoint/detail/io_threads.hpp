// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <future>
#include <mutex>
#include <stop_token>
#include <thread>
#include <vector>

namespace mics::checkpoint::detail {

/// Pieces are read and written in requests of this size: long enough for a disk that takes some at
/// once, and so short that the buffers in use stay in the processor's caches, which devices read
/// and write as well. A multiple of the blocks that are summed.
inline constexpr std::int64_t request_bytes = std::int64_t{2} << 20;
/// Buffers that are filled, on their way or emptied.
inline constexpr std::size_t request_count = 4;
inline constexpr std::int64_t request_memory = request_bytes * std::int64_t{request_count};

/// Two threads that wait for disks, started by the first request. Local.
class IoThreads {
 public:
  IoThreads() = default;
  IoThreads(const IoThreads&) = delete;
  IoThreads& operator=(const IoThreads&) = delete;
  /// Waits for requests that have begun; others are not begun.
  ~IoThreads() = default;

  /// \return ready when the request is done, with what it threw
  [[nodiscard]] std::future<void> submit(std::packaged_task<void()> request);

 private:
  void serve(const std::stop_token& stop);

  std::mutex mutex_;
  std::condition_variable_any arrived_;
  std::deque<std::packaged_task<void()>> requests_;
  std::vector<std::jthread> threads_;  // last: they end first
};

/// Requests under way, one a buffer. Waits for all of them when it goes, before their memory does.
class Requests {
 public:
  Requests() = default;
  Requests(const Requests&) = delete;
  Requests& operator=(const Requests&) = delete;
  ~Requests();

  /// Waits for the one of that buffer, if there is one. \throws what it threw
  void finish(std::size_t buffer);
  void begin(std::size_t buffer, IoThreads& threads, std::packaged_task<void()> request);

 private:
  std::array<std::future<void>, request_count> under_way_;
};

}  // namespace mics::checkpoint::detail
