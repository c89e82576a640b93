// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>

#include <Kokkos_Core.hpp>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>

namespace mics::test {

/// An execution-space instance of the host whose kernels run late on a thread of their own, one
/// after another: what a busy stream of a device looks like. Copies share the stream.
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

  /// The instance that an engine is told of.
  [[nodiscard]] const DelayedStream& instance() const { return *this; }

  /// Starts `kernel(i)` for every i below `count` after everything that was launched before, no
  /// sooner than the delay. Returns at once.
  template <class Kernel>
  void launch(int count, Kernel kernel) const {
    auto before = std::make_shared<std::jthread>(std::move(state_->last));
    state_->last = std::jthread([=, delay = delay_] {
      if (before->joinable()) before->join();
      std::this_thread::sleep_for(delay);
      for (int i = 0; i < count; ++i) kernel(i);
    });
  }
  /// Waits for everything that was launched.
  void fence(const std::string& /*reason*/ = {}) const {
    if (state_->last.joinable()) state_->last.join();
  }

 private:
  struct State {
    std::jthread last;
  };
  std::shared_ptr<State> state_;
  std::chrono::milliseconds delay_;
};

/// A kernel of one thread that takes its time.
struct Spin {
  std::int64_t turns;
  Kokkos::View<std::uint32_t, device::MemorySpace> result;  // so that the turns are taken
  KOKKOS_FUNCTION void operator()(int) const {
    std::uint32_t x = result();
    for (std::int64_t i = 0; i < turns; ++i) x = x * 1664525U + 1013904223U;
    result() = x;
  }
};

/// The same on a device: an instance of its own, on which a kernel that spins precedes each.
class SpinningStream {
 public:
  explicit SpinningStream(std::chrono::milliseconds delay)
      : instance_(Kokkos::Experimental::partition_space(device::Space(), 1)[0]),
        turns_(delay.count() * turns_a_millisecond) {}

  [[nodiscard]] const device::Space& instance() const { return instance_; }

  template <class Kernel>
  void launch(int count, Kernel kernel) const {
    using Range = Kokkos::RangePolicy<device::Space>;
    if (turns_ > 0) {
      Kokkos::parallel_for("mics::test::Spin", Range(instance_, 0, 1), Spin{turns_, result_});
    }
    Kokkos::parallel_for("mics::test::late", Range(instance_, 0, count), kernel);
  }
  void fence() const { instance_.fence("mics::test::SpinningStream"); }

 private:
  // A turn is a multiplication that waits for the one before: 4 cycles or more below 2 GHz.
  static constexpr std::int64_t turns_a_millisecond = 500'000;

  device::Space instance_;
  std::int64_t turns_;
  Kokkos::View<std::uint32_t, device::MemorySpace> result_{"mics::test::Spin"};
};

using LateStream = std::conditional_t<device::separate, SpinningStream, DelayedStream>;

}  // namespace mics::test
