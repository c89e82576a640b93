// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/optim/optimizer.hpp>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace mics::optim::detail {

/// An epsilon with which 0 / (0 + epsilon) is 0.
template <class T>
[[nodiscard]] T at_least_normal(double epsilon) {
  return std::max(static_cast<T>(epsilon), std::numeric_limits<T>::min());
}

/// What the optimizers of mics share: names, the average of the weights, checks of a slice.
class BuiltIn : public Optimizer {
 public:
  /// \param states  their names, without the average of the weights
  BuiltIn(const OptimizerConfig& config, std::vector<std::string> states);

  [[nodiscard]] std::string_view name() const final;
  [[nodiscard]] std::vector<StateSpec> states() const final;
  [[nodiscard]] std::string describe() const final;

 protected:
  [[nodiscard]] const OptimizerConfig& config() const { return config_; }
  [[nodiscard]] std::array<double, 2> betas(const StepInfo& info) const {
    return info.betas.value_or(config_.betas);
  }
  /// 1 - beta^step for both; 1 where the correction is off.
  [[nodiscard]] std::array<double, 2> bias_corrections(const StepInfo& info) const;
  /// \throws ArgumentError for missing arrays, a step below 1, or norms of the wrong size
  void check(const Slice& slice, const StepInfo& info) const;

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
