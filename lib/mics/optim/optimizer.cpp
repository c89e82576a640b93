// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/for_blocks.hpp>

#include <cmath>
#include <limits>

namespace mics {

std::string_view name(OptimizerKind kind) {
  switch (kind) {
    case OptimizerKind::adamw:
      return "adamw";
    case OptimizerKind::adam:
      return "adam";
    case OptimizerKind::sgd:
      return "sgd";
    case OptimizerKind::lion:
      return "lion";
    case OptimizerKind::adagrad:
      return "adagrad";
    case OptimizerKind::lamb:
      break;
  }
  return "lamb";
}

}  // namespace mics

namespace mics::optim {
namespace {

void require_between(const std::string& object, double value, double lowest, double highest) {
  if (std::isfinite(value) && value >= lowest && value <= highest) return;
  std::string range = "a finite number of at least " + std::to_string(lowest);
  if (std::isfinite(highest)) range += " and at most " + std::to_string(highest);
  raise<ConfigError>({.object = object, .expected = range, .found = std::to_string(value)});
}

void check(const OptimizerConfig& config) {
  constexpr double any = std::numeric_limits<double>::infinity();
  const std::string prefix = std::string(name(config.kind)) + ": ";
  const auto between = [&](const char* key, double value, double lowest, double highest) {
    require_between(prefix + key, value, lowest, highest);
  };
  between("learning_rate", config.learning_rate, 0, any);
  between("betas[0]", config.betas[0], 0, 1 - 1e-12);
  between("betas[1]", config.betas[1], 0, 1 - 1e-12);
  between("epsilon", config.epsilon, 0, any);
  between("weight_decay", config.weight_decay, 0, any);
  if (config.ema_decay) between("ema_decay", *config.ema_decay, 0, 1);
  if (config.kind == OptimizerKind::sgd) {
    between("momentum", config.momentum, 0, any);
    between("dampening", config.dampening, -any, any);
    if (config.nesterov && (config.momentum == 0 || config.dampening != 0)) {
      raise<ConfigError>({.object = prefix + "nesterov",
                          .expected = "a momentum, and no dampening",
                          .found = "momentum " + std::to_string(config.momentum) + ", dampening " +
                                   std::to_string(config.dampening)});
    }
  }
  if (config.kind == OptimizerKind::lamb) {
    between("min_coefficient", config.min_coefficient, 0, any);
    between("max_coefficient", config.max_coefficient, config.min_coefficient, any);
  }
}

}  // namespace

void Optimizer::add_norms(const Slice& /*slice*/, const StepInfo& /*info*/,
                          std::span<double> /*norms*/, std::span<double> /*partials*/) const {}

std::int64_t Optimizer::norm_partials(std::int64_t count, std::int64_t tensors) const {
  return norms_per_tensor() * (state::blocks_of(count) + tensors);
}

namespace {

[[noreturn]] void refuse_device(const Optimizer& optimizer) {
  raise<StateError>({.object = "optimizer " + std::string(optimizer.name()),
                     .expected = "one that runs on a device",
                     .found = "only the functions of the host",
                     .remedy = "override enqueue_update(), or keep the state in host memory"});
}

}  // namespace

void Optimizer::enqueue_norms(const Execution& /*exec*/, const Slice& /*slice*/,
                              const DeviceStepInfo* /*info*/, double* /*norms*/,
                              double* /*partials*/) const {
  if (norms_per_tensor() > 0) refuse_device(*this);
}

void Optimizer::enqueue_update(const Execution& /*exec*/, const Slice& /*slice*/,
                               const DeviceStepInfo* /*info*/) const {
  refuse_device(*this);
}

std::unique_ptr<Optimizer> make_optimizer(const OptimizerConfig& config) {
  check(config);
  switch (config.kind) {
    case OptimizerKind::adamw:
    case OptimizerKind::adam:
      return detail::make_adam(config);
    case OptimizerKind::sgd:
      return detail::make_sgd(config);
    case OptimizerKind::lion:
      return detail::make_lion(config);
    case OptimizerKind::adagrad:
      return detail::make_adagrad(config);
    case OptimizerKind::lamb:
      break;
  }
  return detail::make_lamb(config);
}

}  // namespace mics::optim
