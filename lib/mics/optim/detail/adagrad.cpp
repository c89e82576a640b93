// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/device_sweep.hpp>
#include <mics/optim/detail/sweep.hpp>

namespace mics::optim::detail {
namespace {

class Adagrad final : public BuiltIn {
 public:
  explicit Adagrad(const OptimizerConfig& config) : BuiltIn(config, {"sum"}) {}

  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    sweep_rule<AdagradRule>("mics::optim::adagrad", slice, config().ema_decay, settings(),
                            step_of(info));
  }

  void enqueue_update(const Execution& exec, const Slice& slice,
                      const DeviceStepInfo* info) const override {
    check(slice);
    enqueue_sweep<AdagradRule>("mics::optim::adagrad", exec, slice, config().ema_decay, settings(),
                               info);
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_adagrad(const OptimizerConfig& config) {
  return std::make_unique<Adagrad>(config);
}

}  // namespace mics::optim::detail
