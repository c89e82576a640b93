// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/optim/detail/rules.hpp>
#include <mics/optim/optimizer.hpp>

#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mics::optim::detail {

/// What the optimizers of mics share: names, the average of the weights, checks of a slice.
class BuiltIn : public Optimizer {
 public:
  /// \param states  their names, without the average of the weights
  BuiltIn(const OptimizerConfig& config, std::vector<std::string> states);

  [[nodiscard]] std::string_view name() const final;
  [[nodiscard]] std::vector<StateSpec> states() const final;
  [[nodiscard]] std::string describe() const final;
  [[nodiscard]] bool runs_on_device() const final { return true; }

 protected:
  [[nodiscard]] const OptimizerConfig& config() const { return config_; }
  [[nodiscard]] RuleSettings settings() const;
  /// What the rules read of a step of the host.
  [[nodiscard]] DeviceStepInfo step_of(const StepInfo& info) const;
  /// \throws ArgumentError for missing arrays or a step that cannot be
  void check(const Slice& slice, const StepInfo& info) const;
  /// The part of check() that a slice in device memory can have.
  void check(const Slice& slice) const;

 private:
  OptimizerConfig config_;
  std::vector<std::string> states_;
};

[[nodiscard]] std::unique_ptr<Optimizer> make_adam(const OptimizerConfig& config);  // or adamw
[[nodiscard]] std::unique_ptr<Optimizer> make_sgd(const OptimizerConfig& config);
[[nodiscard]] std::unique_ptr<Optimizer> make_lion(const OptimizerConfig& config);
[[nodiscard]] std::unique_ptr<Optimizer> make_adagrad(const OptimizerConfig& config);
[[nodiscard]] std::unique_ptr<Optimizer> make_lamb(const OptimizerConfig& config);

}  // namespace mics::optim::detail
