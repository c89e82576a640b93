// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/optim/device_step_info.hpp>

#include <Kokkos_Core.hpp>

// The formula of each optimizer for one element, the one place that holds it: the loops of the host
// and the kernels of the device call it. T is the master dtype. A rule is made once for elements
// that share their hyper-parameters, and then called for each with its state in place.

namespace mics::optim::detail {

/// The numbers of a configuration that the rules read.
struct RuleSettings {
  double epsilon = 0;
  double weight_decay = 0;
  double momentum = 0;
  double dampening = 0;
  double max_coefficient = 0;
  double min_coefficient = 0;
};

/// What the rates of some elements are multiplied by.
struct Factors {
  double learning_rate = 1;
  double weight_decay = 1;
  double weight_norm = 0;  ///< |w| and |u| of their tensor, for rules that read norms
  double update_norm = 0;
};

/// An epsilon with which 0 / (0 + epsilon) is 0.
template <class T>
[[nodiscard]] KOKKOS_INLINE_FUNCTION T at_least_normal(double epsilon) {
  constexpr T smallest = Kokkos::Experimental::norm_min_v<T>;
  const auto value = static_cast<T>(epsilon);
  return value < smallest ? smallest : value;
}

template <class T, bool decoupled>
class AdamRule {
 public:
  using Value = T;
  static constexpr int states = 2;  ///< exp_avg, exp_avg_sq
  static constexpr bool reads_norms = false;

  KOKKOS_INLINE_FUNCTION AdamRule(const RuleSettings& settings, const DeviceStepInfo& step,
                                  const Factors& factors) {
    const double rate = step.learning_rate * factors.learning_rate;
    const double decay = settings.weight_decay * factors.weight_decay;
    step_size_ = static_cast<T>(rate / step.correction1);
    keep_ = static_cast<T>(1 - rate * decay);
    l2_ = static_cast<T>(decay);
    beta1_ = static_cast<T>(step.beta1);
    beta2_ = static_cast<T>(step.beta2);
    one_minus_beta1_ = static_cast<T>(1 - step.beta1);
    one_minus_beta2_ = static_cast<T>(1 - step.beta2);
    scale_ = static_cast<T>(step.gradient_scale);
    root_correction2_ = static_cast<T>(1 / Kokkos::sqrt(step.correction2));
    epsilon_ = at_least_normal<T>(settings.epsilon);
  }

  KOKKOS_INLINE_FUNCTION void operator()(T gradient, T& weight, T& exp_avg, T& exp_avg_sq) const {
    const T w = weight;
    T g = gradient * scale_;
    if constexpr (!decoupled) g += l2_ * w;
    const T m = beta1_ * exp_avg + one_minus_beta1_ * g;
    const T v = beta2_ * exp_avg_sq + one_minus_beta2_ * g * g;
    const T change = step_size_ * (m / (Kokkos::sqrt(v) * root_correction2_ + epsilon_));
    exp_avg = m;
    exp_avg_sq = v;
    weight = (decoupled ? w * keep_ : w) - change;
  }

 private:
  T step_size_;
  T keep_;
  T l2_;
  T beta1_;
  T beta2_;
  T one_minus_beta1_;
  T one_minus_beta2_;
  T scale_;
  T root_correction2_;
  T epsilon_;
};

template <class T>
class SgdRule {
 public:
  using Value = T;
  static constexpr int states = 0;
  static constexpr bool reads_norms = false;

  KOKKOS_INLINE_FUNCTION SgdRule(const RuleSettings& settings, const DeviceStepInfo& step,
                                 const Factors& factors)
      : rate_(static_cast<T>(step.learning_rate * factors.learning_rate)),
        decay_(static_cast<T>(settings.weight_decay * factors.weight_decay)),
        scale_(static_cast<T>(step.gradient_scale)) {}

  KOKKOS_INLINE_FUNCTION void operator()(T gradient, T& weight) const {
    const T w = weight;
    weight = w - rate_ * (gradient * scale_ + decay_ * w);
  }

 private:
  T rate_;
  T decay_;
  T scale_;
};

template <class T, bool nesterov>
class MomentumRule {
 public:
  using Value = T;
  static constexpr int states = 1;  ///< momentum_buffer
  static constexpr bool reads_norms = false;

  // The buffer starts as the first gradient, whole.
  KOKKOS_INLINE_FUNCTION MomentumRule(const RuleSettings& settings, const DeviceStepInfo& step,
                                      const Factors& factors)
      : rate_(static_cast<T>(step.learning_rate * factors.learning_rate)),
        decay_(static_cast<T>(settings.weight_decay * factors.weight_decay)),
        scale_(static_cast<T>(step.gradient_scale)),
        keep_(static_cast<T>(settings.momentum)),
        take_(static_cast<T>(step.step == 1 ? 1 : 1 - settings.dampening)) {}

  KOKKOS_INLINE_FUNCTION void operator()(T gradient, T& weight, T& momentum_buffer) const {
    const T w = weight;
    const T g = gradient * scale_ + decay_ * w;
    const T m = keep_ * momentum_buffer + take_ * g;
    momentum_buffer = m;
    weight = w - rate_ * (nesterov ? g + keep_ * m : m);
  }

 private:
  T rate_;
  T decay_;
  T scale_;
  T keep_;
  T take_;
};

template <class T>
class LionRule {
 public:
  using Value = T;
  static constexpr int states = 1;  ///< exp_avg
  static constexpr bool reads_norms = false;

  KOKKOS_INLINE_FUNCTION LionRule(const RuleSettings& settings, const DeviceStepInfo& step,
                                  const Factors& factors) {
    const double step_size = step.learning_rate * factors.learning_rate;
    rate_ = static_cast<T>(step_size);
    keep_ = static_cast<T>(1 - step_size * settings.weight_decay * factors.weight_decay);
    beta1_ = static_cast<T>(step.beta1);
    beta2_ = static_cast<T>(step.beta2);
    one_minus_beta1_ = static_cast<T>(1 - step.beta1);
    one_minus_beta2_ = static_cast<T>(1 - step.beta2);
    scale_ = static_cast<T>(step.gradient_scale);
  }

  KOKKOS_INLINE_FUNCTION void operator()(T gradient, T& weight, T& exp_avg) const {
    const T g = gradient * scale_;
    const T m = exp_avg;
    const T c = beta1_ * m + one_minus_beta1_ * g;
    const auto sign = static_cast<T>(static_cast<int>(c > 0) - static_cast<int>(c < 0));
    exp_avg = beta2_ * m + one_minus_beta2_ * g;
    weight = weight * keep_ - rate_ * sign;
  }

 private:
  T rate_;
  T keep_;
  T beta1_;
  T beta2_;
  T one_minus_beta1_;
  T one_minus_beta2_;
  T scale_;
};

template <class T>
class AdagradRule {
 public:
  using Value = T;
  static constexpr int states = 1;  ///< sum
  static constexpr bool reads_norms = false;

  KOKKOS_INLINE_FUNCTION AdagradRule(const RuleSettings& settings, const DeviceStepInfo& step,
                                     const Factors& factors)
      : rate_(static_cast<T>(step.learning_rate * factors.learning_rate)),
        decay_(static_cast<T>(settings.weight_decay * factors.weight_decay)),
        scale_(static_cast<T>(step.gradient_scale)),
        epsilon_(at_least_normal<T>(settings.epsilon)) {}

  KOKKOS_INLINE_FUNCTION void operator()(T gradient, T& weight, T& sum) const {
    const T w = weight;
    const T g = gradient * scale_ + decay_ * w;
    const T s = sum + g * g;
    sum = s;
    weight = w - rate_ * (g / (Kokkos::sqrt(s) + epsilon_));
  }

 private:
  T rate_;
  T decay_;
  T scale_;
  T epsilon_;
};

template <class T>
class LambRule {
 public:
  using Value = T;
  static constexpr int states = 2;  ///< exp_avg, exp_avg_sq
  static constexpr bool reads_norms = true;

  KOKKOS_INLINE_FUNCTION LambRule(const RuleSettings& settings, const DeviceStepInfo& step,
                                  const Factors& factors) {
    const double step_size = step.learning_rate * Kokkos::sqrt(step.correction2) / step.correction1;
    double ratio = 1;
    if (factors.weight_norm != 0 && factors.update_norm != 0) {
      ratio = factors.weight_norm / factors.update_norm;
      if (ratio < settings.min_coefficient) {
        ratio = settings.min_coefficient;
      } else if (settings.max_coefficient < ratio) {
        ratio = settings.max_coefficient;
      }
    }
    rate_ = static_cast<T>(step_size * factors.learning_rate * ratio);
    beta1_ = static_cast<T>(step.beta1);
    beta2_ = static_cast<T>(step.beta2);
    one_minus_beta1_ = static_cast<T>(1 - step.beta1);
    one_minus_beta2_ = static_cast<T>(1 - step.beta2);
    epsilon_ = at_least_normal<T>(settings.epsilon);
    scale_ = static_cast<T>(step.gradient_scale);
    decay_ = static_cast<T>(settings.weight_decay * factors.weight_decay);
  }

  /// The direction u, whose norm over the tensor the ratio needs; updates the moments.
  KOKKOS_INLINE_FUNCTION T direction(T gradient, T weight, T& exp_avg, T& exp_avg_sq) const {
    const T g = gradient * scale_;
    const T m = beta1_ * exp_avg + one_minus_beta1_ * g;
    const T v = beta2_ * exp_avg_sq + one_minus_beta2_ * g * g;
    exp_avg = m;
    exp_avg_sq = v;
    return m / (Kokkos::sqrt(v) + epsilon_) + decay_ * weight;
  }

  KOKKOS_INLINE_FUNCTION void operator()(T gradient, T& weight, T& exp_avg, T& exp_avg_sq) const {
    weight -= rate_ * direction(gradient, weight, exp_avg, exp_avg_sq);
  }

 private:
  T rate_;
  T beta1_;
  T beta2_;
  T one_minus_beta1_;
  T one_minus_beta2_;
  T epsilon_;
  T scale_;
  T decay_;
};

template <class T>
using AdamWRule = AdamRule<T, true>;
template <class T>
using AdamL2Rule = AdamRule<T, false>;
template <class T>
using HeavyBallRule = MomentumRule<T, false>;
template <class T>
using NesterovRule = MomentumRule<T, true>;

}  // namespace mics::optim::detail
