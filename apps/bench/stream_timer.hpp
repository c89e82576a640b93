// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/execution.hpp>

#include <memory>

namespace mics::apps::bench {

/// Seconds between two points in the work of an instance of device::Space, by events of its queue:
/// what the host does meanwhile does not count. Without a device the host's clock, after fences.
class StreamTimer {
 public:
  /// Local; allocates.
  explicit StreamTimer(const Execution& exec);
  ~StreamTimer();
  StreamTimer(const StreamTimer&) = delete;
  StreamTimer& operator=(const StreamTimer&) = delete;

  /// Enqueue the two points. Local; do not block on a device.
  void start();
  void stop();
  /// Blocks until the work before the second point is done. Local.
  [[nodiscard]] double seconds() const;

 private:
  struct Points;
  Execution exec_;
  std::unique_ptr<Points> points_;
};

}  // namespace mics::apps::bench
