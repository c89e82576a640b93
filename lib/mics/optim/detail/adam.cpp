// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/sweep.hpp>

#include <cmath>

namespace mics::optim::detail {
namespace {

class Adam final : public BuiltIn {
 public:
  explicit Adam(const OptimizerConfig& config) : BuiltIn(config, {"exp_avg", "exp_avg_sq"}) {}

  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    if (config().kind == OptimizerKind::adamw) {
      update_as<true>("mics::optim::adamw", slice, info);
    } else {
      update_as<false>("mics::optim::adam", slice, info);
    }
  }

 private:
  template <bool decoupled>
  void update_as(const char* label, const Slice& slice, const StepInfo& info) const {
    const std::array<double, 2> beta = betas(info);
    const std::array<double, 2> correction = bias_corrections(info);
    const double weight_decay = config().weight_decay;
    const StepInfo step = info;
    const double epsilon = config().epsilon;
    sweep(label, slice, config().ema_decay, [=]<class T>(const Piece<T>& piece) {
      const double rate = step.learning_rate * piece.learning_rate_factor;
      const double decay = weight_decay * piece.weight_decay_factor;
      const auto step_size = static_cast<T>(rate / correction[0]);
      const auto keep = static_cast<T>(1 - rate * decay);
      const auto l2 = static_cast<T>(decay);
      const auto beta1 = static_cast<T>(beta[0]);
      const auto beta2 = static_cast<T>(beta[1]);
      const auto one_minus_beta1 = static_cast<T>(1 - beta[0]);
      const auto one_minus_beta2 = static_cast<T>(1 - beta[1]);
      const auto scale = static_cast<T>(step.gradient_scale);
      const auto root_correction2 = static_cast<T>(1 / std::sqrt(correction[1]));
      const T eps = at_least_normal<T>(epsilon);
      const T* const gradient = piece.gradient;
      T* const weights = piece.weights;
      T* const exp_avg = piece.states[0];
      T* const exp_avg_sq = piece.states[1];
      const std::int64_t count = piece.count;
#pragma GCC ivdep
      for (std::int64_t i = 0; i < count; ++i) {
        const T w = weights[i];
        T g = gradient[i] * scale;
        if constexpr (!decoupled) g += l2 * w;
        const T m = beta1 * exp_avg[i] + one_minus_beta1 * g;
        const T v = beta2 * exp_avg_sq[i] + one_minus_beta2 * g * g;
        const T change = step_size * (m / (std::sqrt(v) * root_correction2 + eps));
        exp_avg[i] = m;
        exp_avg_sq[i] = v;
        weights[i] = (decoupled ? w * keep : w) - change;
      }
    });
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_adam(const OptimizerConfig& config) {
  return std::make_unique<Adam>(config);
}

}  // namespace mics::optim::detail
