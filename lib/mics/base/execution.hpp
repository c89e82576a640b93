// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/error.hpp>

#include <Kokkos_Core.hpp>

#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace mics {

namespace detail {
struct AnyInstance;
}

/// A point in the work of an execution-space instance: everything that it had been given when the
/// marker was made. A default-made one lies before all work. Copies are the same point.
class Marker {
 public:
  Marker() = default;
  /// True if the work before the point is finished. Local; does not block.
  [[nodiscard]] bool done() const;
  /// Blocks the host until it is. Local.
  void wait(const std::string& reason) const;

 private:
  friend class Execution;
  std::shared_ptr<void> event_;                          // of the vendor
  std::shared_ptr<const detail::AnyInstance> instance_;  // one without streams: fenced instead
};

namespace detail {

/// An execution-space instance without its type.
struct AnyInstance {
  virtual ~AnyInstance() = default;
  virtual void fence(const std::string& reason) const = 0;
  [[nodiscard]] virtual bool reaches_host() const = 0;
  /// The vendor's stream; null for an instance of the host.
  [[nodiscard]] virtual void* stream() const = 0;
  /// Of an instance with a stream, see Execution::gates().
  mutable std::vector<Marker> gates;
};

template <class Space>
struct Instance final : AnyInstance {
  explicit Instance(Space space_) : space(std::move(space_)) {}
  void fence(const std::string& reason) const override { space.fence(reason); }
  [[nodiscard]] bool reaches_host() const override {
    return Kokkos::SpaceAccessibility<Space, Kokkos::HostSpace>::accessible;
  }
  [[nodiscard]] void* stream() const override {
    if constexpr (requires { space.cuda_stream(); }) {
      return static_cast<void*>(space.cuda_stream());
    } else if constexpr (requires { space.hip_stream(); }) {
      return static_cast<void*>(space.hip_stream());
    } else {
      return nullptr;
    }
  }
  Space space;
};

}  // namespace detail

/// Any Kokkos execution-space instance as a run-time value: what the library needs to order its own
/// work after the application's and before it. Copies share the instance.
class Execution {
 public:
  /// The default instance of the default execution space, for want of a choice.
  Execution() : Execution(Kokkos::DefaultExecutionSpace()) { chosen_ = false; }

  template <class Space>
  requires Kokkos::is_execution_space_v<Space> Execution(
      const Space& instance)  // NOLINT: an instance is an execution
      : self_(std::make_shared<detail::Instance<Space>>(instance)) {}

  /// Waits on the host until all work of the instance has finished.
  void fence(const std::string& reason) const { self_->fence(reason); }

  /// True if views of the host can be read and written by kernels of this instance.
  [[nodiscard]] bool reaches_host() const { return self_->reaches_host(); }

  /// The vendor's stream; null for an instance of the host.
  [[nodiscard]] void* stream() const { return self_->stream(); }

  /// False if nobody named the instance.
  [[nodiscard]] bool chosen() const { return chosen_; }

  /// The point after all work that the instance has now. Local; does not block. Cost: about a
  /// microsecond on a device.
  [[nodiscard]] Marker mark() const;

  /// Later work of this instance runs after the marker. Local. Blocks the host only where one of
  /// the two instances has no stream.
  void wait_for(const Marker& marker) const;
  /// Later work of this instance runs after all work that `other` has now.
  void wait_for(const Execution& other) const {
    if (!same_as(other)) wait_for(other.mark());
  }

  /// Markers after which an instance with a stream can begin what it is given next: its own last
  /// one, and those that it was told to wait for since. Other work that it was given since its last
  /// marker is not covered. Local; unlike a new marker it takes no time of the device, which pays
  /// about a microsecond for each between two kernels.
  [[nodiscard]] const std::vector<Marker>& gates() const { return self_->gates; }

  /// True if both order their work in the same queue.
  [[nodiscard]] bool same_as(const Execution& other) const {
    return self_ == other.self_ || (stream() != nullptr && stream() == other.stream());
  }

  /// The instance itself, for launching kernels. \throws ArgumentError if it is of another space
  template <class Space>
  [[nodiscard]] const Space& as() const {
    const auto* instance = dynamic_cast<const detail::Instance<Space>*>(self_.get());
    if (instance == nullptr) {
      raise<ArgumentError>({.object = "execution-space instance",
                            .expected = Space::name(),
                            .found = "an instance of another space"});
    }
    return instance->space;
  }

 private:
  std::shared_ptr<const detail::AnyInstance> self_;
  bool chosen_ = true;
};

/// The newest markers of several instances, one each: everything that used a thing.
class Markers {
 public:
  /// All work that `exec` has now.
  void add(const Execution& exec) {
    for (auto& [instance, marker] : newest_) {
      if (!instance.same_as(exec)) continue;
      marker = exec.mark();
      return;
    }
    newest_.emplace_back(exec, exec.mark());
  }
  /// Later work of `exec` runs after all of it. Local; blocks as Execution::wait_for.
  void order_before(const Execution& exec) const {
    for (const auto& [instance, marker] : newest_) {
      if (!instance.same_as(exec) || exec.reaches_host()) exec.wait_for(marker);
    }
  }
  void clear() { newest_.clear(); }
  [[nodiscard]] bool empty() const { return newest_.empty(); }

 private:
  std::vector<std::pair<Execution, Marker>> newest_;
};

}  // namespace mics
