// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/device_sweep.hpp>
#include <mics/optim/detail/sweep.hpp>

namespace mics::optim::detail {
namespace {

class Adam final : public BuiltIn {
 public:
  explicit Adam(const OptimizerConfig& config) : BuiltIn(config, {"exp_avg", "exp_avg_sq"}) {}

  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    if (config().kind == OptimizerKind::adamw) {
      sweep_rule<AdamWRule>("mics::optim::adamw", slice, config().ema_decay, settings(),
                            step_of(info));
    } else {
      sweep_rule<AdamL2Rule>("mics::optim::adam", slice, config().ema_decay, settings(),
                             step_of(info));
    }
  }

  void enqueue_update(const Execution& exec, const Slice& slice,
                      const DeviceStepInfo* info) const override {
    check(slice);
    if (config().kind == OptimizerKind::adamw) {
      enqueue_sweep<AdamWRule>("mics::optim::adamw", exec, slice, config().ema_decay, settings(),
                               info);
    } else {
      enqueue_sweep<AdamL2Rule>("mics::optim::adam", exec, slice, config().ema_decay, settings(),
                                info);
    }
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_adam(const OptimizerConfig& config) {
  return std::make_unique<Adam>(config);
}

}  // namespace mics::optim::detail
