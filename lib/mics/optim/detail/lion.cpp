// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/device_sweep.hpp>
#include <mics/optim/detail/sweep.hpp>

namespace mics::optim::detail {
namespace {

class Lion final : public BuiltIn {
 public:
  explicit Lion(const OptimizerConfig& config) : BuiltIn(config, {"exp_avg"}) {}

  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    sweep_rule<LionRule>("mics::optim::lion", slice, config().ema_decay, settings(), step_of(info));
  }

  void enqueue_update(const Execution& exec, const Slice& slice,
                      const DeviceStepInfo* info) const override {
    check(slice);
    enqueue_sweep<LionRule>("mics::optim::lion", exec, slice, config().ema_decay, settings(), info);
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_lion(const OptimizerConfig& config) {
  return std::make_unique<Lion>(config);
}

}  // namespace mics::optim::detail
