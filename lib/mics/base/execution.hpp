// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Core.hpp>

#include <memory>
#include <string>
#include <utility>

namespace mics {

/// Any Kokkos execution-space instance as a run-time value: what the library needs to order its own
/// work after the application's and before it. Copies share the instance.
class Execution {
 public:
  /// The default instance of the default execution space.
  Execution() : Execution(Kokkos::DefaultExecutionSpace()) {}

  template <class Space>
  requires Kokkos::is_execution_space_v<Space> Execution(
      const Space& instance)  // NOLINT: an instance is an execution
      : self_(std::make_shared<Model<Space>>(instance)) {}

  /// Waits on the host until all work of the instance has finished.
  void fence(const std::string& reason) const { self_->fence(reason); }

  /// True if views of the host can be read and written by kernels of this instance.
  [[nodiscard]] bool reaches_host() const { return self_->reaches_host(); }

 private:
  struct Concept {
    virtual ~Concept() = default;
    virtual void fence(const std::string& reason) const = 0;
    [[nodiscard]] virtual bool reaches_host() const = 0;
  };
  template <class Space>
  struct Model final : Concept {
    explicit Model(Space space) : instance(std::move(space)) {}
    void fence(const std::string& reason) const override { instance.fence(reason); }
    [[nodiscard]] bool reaches_host() const override {
      return Kokkos::SpaceAccessibility<Space, Kokkos::HostSpace>::accessible;
    }
    Space instance;
  };
  std::shared_ptr<const Concept> self_;
};

}  // namespace mics
