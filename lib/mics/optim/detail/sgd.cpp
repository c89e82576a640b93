// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/sweep.hpp>

namespace mics::optim::detail {
namespace {

class Sgd final : public BuiltIn {
 public:
  explicit Sgd(const OptimizerConfig& config)
      : BuiltIn(config, config.momentum != 0 ? std::vector<std::string>{"momentum_buffer"}
                                             : std::vector<std::string>{}) {}

  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    if (config().momentum == 0) {
      update_plain(slice, info);
    } else if (config().nesterov) {
      update_with_momentum<true>(slice, info);
    } else {
      update_with_momentum<false>(slice, info);
    }
  }

 private:
  void update_plain(const Slice& slice, const StepInfo& info) const {
    const double weight_decay = config().weight_decay;
    const double learning_rate = info.learning_rate;
    const double gradient_scale = info.gradient_scale;
    sweep("mics::optim::sgd", slice, config().ema_decay, [=]<class T>(const Piece<T>& piece) {
      const Decayed<T> in(piece, learning_rate, weight_decay, gradient_scale);
      const T* const gradient = piece.gradient;
      T* const weights = piece.weights;
      const std::int64_t count = piece.count;
#pragma GCC ivdep
      for (std::int64_t i = 0; i < count; ++i) {
        const T w = weights[i];
        weights[i] = w - in.rate * in.gradient(gradient[i], w);
      }
    });
  }

  template <bool nesterov>
  void update_with_momentum(const Slice& slice, const StepInfo& info) const {
    const double weight_decay = config().weight_decay;
    const double learning_rate = info.learning_rate;
    const double gradient_scale = info.gradient_scale;
    const double momentum = config().momentum;
    // The buffer starts as the first gradient, whole.
    const double share = info.step == 1 ? 1 : 1 - config().dampening;
    sweep("mics::optim::sgd_momentum", slice, config().ema_decay,
          [=]<class T>(const Piece<T>& piece) {
            const Decayed<T> in(piece, learning_rate, weight_decay, gradient_scale);
            const auto keep = static_cast<T>(momentum);
            const auto take = static_cast<T>(share);
            const T* const gradient = piece.gradient;
            T* const weights = piece.weights;
            T* const momentum_buffer = piece.states[0];
            const std::int64_t count = piece.count;
#pragma GCC ivdep
            for (std::int64_t i = 0; i < count; ++i) {
              const T w = weights[i];
              const T g = in.gradient(gradient[i], w);
              const T m = keep * momentum_buffer[i] + take * g;
              momentum_buffer[i] = m;
              weights[i] = w - in.rate * (nesterov ? g + keep * m : m);
            }
          });
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_sgd(const OptimizerConfig& config) {
  return std::make_unique<Sgd>(config);
}

}  // namespace mics::optim::detail
