// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/mics.hpp>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string_view>
#include <utility>
#include <vector>

// The models of these tests compute on the host, wherever the engine keeps its state: they read
// copies of what leases show, and what they add to gradients is copied back.

namespace mics::test {

/// Lets a test run on device memory: always in a build with a device, elsewhere with
/// MICS_TEST_MEMORY=device, which takes the same path through the library on host memory. Ranks
/// may share a device.
inline void apply_memory(Config& config) {
  const char* const wanted = std::getenv("MICS_TEST_MEMORY");
  if (wanted != nullptr && std::string_view(wanted) == "device") config.memory = Memory::device;
  config.share_device = true;
  // The reference's bits need sums in rank order.
  config.device_sums = comm::DeviceSums::fp32;
}

/// What a view shows, readable on the host.
template <class View>
[[nodiscard]] auto to_host(const View& view) {
  if constexpr (!device::separate) {
    return view;
  } else {
    using Data = typename View::non_const_data_type;
    using Layout = typename View::array_layout;
    Kokkos::View<Data, Layout, Kokkos::HostSpace> copy(
        Kokkos::view_alloc(Kokkos::WithoutInitializing, "copy"), view.layout());
    const Execution exec;
    device::copy(exec, copy.data(), view.data(),
                 static_cast<std::int64_t>(view.size() * sizeof(typename View::value_type)));
    exec.fence("the copy is there");
    return copy;
  }
}

/// `count` elements of the engine's memory after all work of `exec`.
template <class T>
[[nodiscard]] std::vector<T> fetched(const T* data, std::int64_t count,
                                     const Execution& exec = {}) {
  std::vector<T> copy(static_cast<std::size_t>(count));
  device::copy(exec, copy.data(), data, count * static_cast<std::int64_t>(sizeof(T)));
  exec.fence("the copy is there");
  return copy;
}

/// `lease.view<...>(parameter)`, readable on the host.
template <class DataType, class Layout = Kokkos::LayoutRight>
[[nodiscard]] auto host_view(const Lease& lease, ParameterId parameter) {
  return to_host(lease.view<DataType, Layout>(parameter));
}

/// A view of device memory that lies on the host for as long as this lives; copied back at the end.
template <class View>
class Borrowed {
 public:
  using non_const_value_type = typename View::non_const_value_type;

  explicit Borrowed(const View& view) : device_(view), host_(to_host(view)) {}
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;
  ~Borrowed() {
    if constexpr (device::separate) {
      const Execution exec;
      device::copy(exec, device_.data(), host_.data(),
                   static_cast<std::int64_t>(host_.size() * sizeof(*host_.data())));
      exec.fence("the view is copied back");
    }
  }
  auto& operator()(auto... index) const { return host_(index...); }
  [[nodiscard]] std::size_t extent(int i) const { return host_.extent(i); }
  [[nodiscard]] std::size_t size() const { return host_.size(); }
  [[nodiscard]] std::size_t span() const { return host_.span(); }
  [[nodiscard]] auto* data() const { return host_.data(); }

 private:
  View device_;
  decltype(to_host(std::declval<View>())) host_;
};

/// `scope.view<...>(parameter)` on the host until the end of the block.
template <class DataType, class Layout = Kokkos::LayoutRight>
[[nodiscard]] auto host_gradient(const GradientScope& scope, ParameterId parameter) {
  return Borrowed(scope.view<DataType, Layout>(parameter));
}

/// A gradient scope whose views are on the host; what they hold goes to the device before the end.
class HostScope {
 public:
  HostScope(GradientScope scope) : scope_(std::move(scope)) {}  // NOLINT: stands for the scope

  template <class DataType, class Layout = Kokkos::LayoutRight>
  [[nodiscard]] auto view(ParameterId parameter) {
    const auto target = scope_.view<DataType, Layout>(parameter);
    const auto copy = to_host(target);
    if constexpr (device::separate) {
      stores_.push_back([target, copy] {
        const Execution exec;
        device::copy(exec, target.data(), copy.data(),
                     static_cast<std::int64_t>(copy.size() * sizeof(*copy.data())));
        exec.fence("the gradient is there");
      });
    }
    return copy;
  }
  void also_on(const Execution& exec) { scope_.also_on(exec); }
  /// What views show is on the device from now on; their later changes are not.
  void store() {
    for (const auto& one : std::exchange(stores_, {})) one();
  }
  void reduce() {
    store();
    scope_.reduce();
  }
  void defer() {
    store();
    scope_.defer();
  }

 private:
  GradientScope scope_;
  std::vector<std::function<void()>> stores_;
};

/// Adds to the engine's loss from the host.
inline void add_loss(Engine& engine, double value) {
  const auto loss = engine.loss();
  if constexpr (!device::separate) {
    loss() += value;
  } else {
    const Execution exec;
    double sum = 0;
    device::copy(exec, &sum, loss.data(), sizeof(sum));
    exec.fence("the loss is there");
    sum += value;
    device::copy(exec, loss.data(), &sum, sizeof(sum));
    exec.fence("the loss is stored");
  }
}

[[nodiscard]] inline double loss_scale(const Engine& engine) {
  return to_host(engine.loss_scale())();
}

}  // namespace mics::test
