// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/sweep.hpp>

#include <cmath>

namespace mics::optim::detail {
namespace {

class Adagrad final : public BuiltIn {
 public:
  explicit Adagrad(const OptimizerConfig& config) : BuiltIn(config, {"sum"}) {}

  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    const double epsilon = config().epsilon;
    const double weight_decay = config().weight_decay;
    const double learning_rate = info.learning_rate;
    const double gradient_scale = info.gradient_scale;
    sweep("mics::optim::adagrad", slice, config().ema_decay, [=]<class T>(const Piece<T>& piece) {
      const Decayed<T> in(piece, learning_rate, weight_decay, gradient_scale);
      const T eps = at_least_normal<T>(epsilon);
      const T* const gradient = piece.gradient;
      T* const weights = piece.weights;
      T* const sums = piece.states[0];
      const std::int64_t count = piece.count;
#pragma GCC ivdep
      for (std::int64_t i = 0; i < count; ++i) {
        const T w = weights[i];
        const T g = in.gradient(gradient[i], w);
        const T s = sums[i] + g * g;
        sums[i] = s;
        weights[i] = w - in.rate * (g / (std::sqrt(s) + eps));
      }
    });
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_adagrad(const OptimizerConfig& config) {
  return std::make_unique<Adagrad>(config);
}

}  // namespace mics::optim::detail
