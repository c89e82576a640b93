// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/sweep.hpp>

namespace mics::optim::detail {
namespace {

class Lion final : public BuiltIn {
 public:
  explicit Lion(const OptimizerConfig& config) : BuiltIn(config, {"exp_avg"}) {}

  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    const std::array<double, 2> beta = betas(info);
    const double weight_decay = config().weight_decay;
    const double learning_rate = info.learning_rate;
    const double gradient_scale = info.gradient_scale;
    sweep("mics::optim::lion", slice, config().ema_decay, [=]<class T>(const Piece<T>& piece) {
      const double step_size = learning_rate * piece.learning_rate_factor;
      const auto rate = static_cast<T>(step_size);
      const auto keep = static_cast<T>(1 - step_size * weight_decay * piece.weight_decay_factor);
      const auto beta1 = static_cast<T>(beta[0]);
      const auto beta2 = static_cast<T>(beta[1]);
      const auto one_minus_beta1 = static_cast<T>(1 - beta[0]);
      const auto one_minus_beta2 = static_cast<T>(1 - beta[1]);
      const auto scale = static_cast<T>(gradient_scale);
      const T* const gradient = piece.gradient;
      T* const weights = piece.weights;
      T* const exp_avg = piece.states[0];
      const std::int64_t count = piece.count;
#pragma GCC ivdep
      for (std::int64_t i = 0; i < count; ++i) {
        const T g = gradient[i] * scale;
        const T m = exp_avg[i];
        const T c = beta1 * m + one_minus_beta1 * g;
        const auto sign = static_cast<T>(static_cast<int>(c > 0) - static_cast<int>(c < 0));
        exp_avg[i] = beta2 * m + one_minus_beta2 * g;
        weights[i] = weights[i] * keep - rate * sign;
      }
    });
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_lion(const OptimizerConfig& config) {
  return std::make_unique<Lion>(config);
}

}  // namespace mics::optim::detail
