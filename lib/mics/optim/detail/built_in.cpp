// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/rounding.hpp>
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/sweep.hpp>

#include <cmath>
#include <cstdio>
#include <utility>

namespace mics::optim::detail {

BuiltIn::BuiltIn(const OptimizerConfig& config, std::vector<std::string> states)
    : config_(config), states_(std::move(states)) {}

std::string_view BuiltIn::name() const { return mics::name(config_.kind); }

std::vector<StateSpec> BuiltIn::states() const {
  std::vector<StateSpec> specs;
  for (const std::string& state : states_) specs.push_back({state, InitialState::zeros});
  if (config_.ema_decay) specs.push_back({"ema", InitialState::weights});
  return specs;
}

std::string BuiltIn::describe() const {
  std::string text(name());
  // Hexadecimal floats: two values that differ in the last bit differ here.
  const auto add = [&](const char* key, double value) {
    std::array<char, 64> part{};
    std::snprintf(part.data(), part.size(), " %s=%a", key, value);
    text += part.data();
  };
  add("lr", config_.learning_rate);
  add("beta1", config_.betas[0]);
  add("beta2", config_.betas[1]);
  add("eps", config_.epsilon);
  add("weight_decay", config_.weight_decay);
  add("bias_correction", config_.bias_correction ? 1 : 0);
  add("momentum", config_.momentum);
  add("dampening", config_.dampening);
  add("nesterov", config_.nesterov ? 1 : 0);
  add("max_coefficient", config_.max_coefficient);
  add("min_coefficient", config_.min_coefficient);
  if (config_.ema_decay) add("ema_decay", *config_.ema_decay);
  return text;
}

std::array<double, 2> BuiltIn::bias_corrections(const StepInfo& info) const {
  if (!config_.bias_correction) return {1, 1};
  const auto [beta1, beta2] = betas(info);
  const auto step = static_cast<double>(info.step);
  return {1 - std::pow(beta1, step), 1 - std::pow(beta2, step)};
}

void BuiltIn::check(const Slice& slice, const StepInfo& info) const {
  const std::string object = "slice of optimizer " + std::string(name());
  if (info.step < 1) {
    raise<ArgumentError>(
        {.object = object, .expected = "step 1 or later", .found = std::to_string(info.step)});
  }
  if (info.betas && !((*info.betas)[0] >= 0 && (*info.betas)[0] < 1 && (*info.betas)[1] >= 0 &&
                      (*info.betas)[1] < 1)) {
    raise<ArgumentError>(
        {.object = "betas of step " + std::to_string(info.step),
         .expected = "numbers of at least 0 and below 1",
         .found = std::to_string((*info.betas)[0]) + ", " + std::to_string((*info.betas)[1]),
         .remedy = "a schedule may raise the momentum too far: decay_mom_rate"});
  }
  const std::size_t wanted = states_.size() + (config_.ema_decay ? 1 : 0);
  if (slice.states.size() != wanted) {
    raise<ArgumentError>({.object = object,
                          .expected = std::to_string(wanted) + " arrays of state",
                          .found = std::to_string(slice.states.size())});
  }
  if (slice.count == 0) return;
  bool missing = slice.gradient == nullptr || slice.master_weights == nullptr;
  for (const void* state : slice.states) missing = missing || state == nullptr;
  if (missing) {
    raise<ArgumentError>({.object = object,
                          .expected = "gradient, master weights and all arrays of state",
                          .found = "a null pointer among them"});
  }
}

namespace {

template <class T>
void write_as(const T* weights, void* compute, DType dtype, std::int64_t begin,
              std::int64_t count) {
  visit(dtype, [&](auto tag) {
    using Compute = typename decltype(tag)::type;
    round_all(weights, static_cast<Compute*>(compute) + begin, count);
  });
}

}  // namespace

void write_compute(const float* weights, void* compute, DType dtype, std::int64_t begin,
                   std::int64_t count) {
  write_as(weights, compute, dtype, begin, count);
}

void write_compute(const double* weights, void* compute, DType dtype, std::int64_t begin,
                   std::int64_t count) {
  write_as(weights, compute, dtype, begin, count);
}

}  // namespace mics::optim::detail
