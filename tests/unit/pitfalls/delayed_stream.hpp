// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Core.hpp>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace mics::test {

/// An execution-space instance whose kernels run late on a thread of their own, one after another:
/// what a busy stream of a device looks like to the host. Copies share the stream.
class DelayedStream {
 public:
  using execution_space = DelayedStream;
  using memory_space = Kokkos::HostSpace;
  using device_type = Kokkos::Device<Kokkos::DefaultHostExecutionSpace, Kokkos::HostSpace>;
  using array_layout = Kokkos::LayoutRight;
  using size_type = std::size_t;
  using scratch_memory_space = Kokkos::DefaultHostExecutionSpace::scratch_memory_space;

  explicit DelayedStream(std::chrono::milliseconds delay)
      : state_(std::make_shared<State>()), delay_(delay) {}

  static const char* name() { return "DelayedStream"; }

  /// Starts `kernel` after everything that was launched before, no sooner than the delay. Returns
  /// at once.
  template <class Kernel>
  void launch(Kernel kernel) const {
    auto before = std::make_shared<std::jthread>(std::move(state_->last));
    state_->last = std::jthread([=, delay = delay_] {
      if (before->joinable()) before->join();
      std::this_thread::sleep_for(delay);
      kernel();
    });
  }
  /// Waits for everything that was launched.
  void fence(const std::string& /*reason*/ = {}) const {
    ++state_->fences;
    if (state_->last.joinable()) state_->last.join();
  }
  [[nodiscard]] std::int64_t fences() const { return state_->fences; }

 private:
  struct State {
    std::jthread last;
    std::int64_t fences = 0;
  };
  std::shared_ptr<State> state_;
  std::chrono::milliseconds delay_;
};

}  // namespace mics::test
