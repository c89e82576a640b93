// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/device_sweep.hpp>
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
      sweep_rule<SgdRule>("mics::optim::sgd", slice, config().ema_decay, settings(), step_of(info));
    } else if (config().nesterov) {
      sweep_rule<NesterovRule>("mics::optim::sgd_momentum", slice, config().ema_decay, settings(),
                               step_of(info));
    } else {
      sweep_rule<HeavyBallRule>("mics::optim::sgd_momentum", slice, config().ema_decay, settings(),
                                step_of(info));
    }
  }

  void enqueue_update(const Execution& exec, const Slice& slice,
                      const DeviceStepInfo* info) const override {
    check(slice);
    if (config().momentum == 0) {
      enqueue_sweep<SgdRule>("mics::optim::sgd", exec, slice, config().ema_decay, settings(), info);
    } else if (config().nesterov) {
      enqueue_sweep<NesterovRule>("mics::optim::sgd_momentum", exec, slice, config().ema_decay,
                                  settings(), info);
    } else {
      enqueue_sweep<HeavyBallRule>("mics::optim::sgd_momentum", exec, slice, config().ema_decay,
                                   settings(), info);
    }
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_sgd(const OptimizerConfig& config) {
  return std::make_unique<Sgd>(config);
}

}  // namespace mics::optim::detail
