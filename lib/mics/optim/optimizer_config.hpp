// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

namespace mics {

enum class OptimizerKind : std::uint8_t {
  adamw,    ///< Adam with decoupled weight decay
  adam,     ///< Adam with the decay added to the gradient
  sgd,      ///< with momentum if it is not 0
  lion,     ///< sign of an interpolated moment
  adagrad,  ///< rate over the root of the sum of squares
  lamb,     ///< AdamW scaled by the ratio of the tensor's norms
};

/// `adamw`, `adam`, `sgd`, `lion`, `adagrad` or `lamb`.
[[nodiscard]] std::string_view name(OptimizerKind kind);

/// An optimizer and its hyper-parameters. Those that the kind does not know are ignored.
struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::adamw;
  double learning_rate = 1e-3;
  std::array<double, 2> betas{0.9, 0.999};  ///< adamw, adam, lamb; lion interpolates and averages
  double epsilon = 1e-8;                    ///< adamw, adam, lamb, adagrad
  double weight_decay = 0;
  bool bias_correction = true;  ///< adamw, adam, lamb
  double momentum = 0;          ///< sgd
  double dampening = 0;         ///< sgd
  bool nesterov = false;        ///< sgd
  double max_coefficient = 10;  ///< lamb: bounds of the ratio of norms
  double min_coefficient = 0.01;
  /// Keeps average = decay * average + (1 - decay) * weights as the named state `ema`.
  std::optional<double> ema_decay = {};
};

}  // namespace mics
