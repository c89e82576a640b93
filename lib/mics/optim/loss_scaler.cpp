// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/loss_scaler.hpp>

#include <cmath>
#include <string>

namespace mics::optim {
namespace {

template <class E, class T>
void require(bool holds, const char* object, const char* expected, const T& found) {
  if (holds) return;
  raise<E>({.object = object, .expected = expected, .found = std::to_string(found)});
}

bool is_positive(double value) { return std::isfinite(value) && value > 0; }

}  // namespace

LossScaler::LossScaler(const LossScaleConfig& config) : config_(config) {
  require<ConfigError>(is_positive(config.initial), "loss scale: initial",
                       "a finite number above 0", config.initial);
  if (config.dynamic) {
    require<ConfigError>(std::isfinite(config.factor) && config.factor > 1, "loss scale: factor",
                         "a finite number above 1", config.factor);
    require<ConfigError>(config.window > 0, "loss scale: window", "1 step or more", config.window);
    require<ConfigError>(config.hysteresis > 0, "loss scale: hysteresis", "1 overflow or more",
                         config.hysteresis);
    require<ConfigError>(is_positive(config.minimum), "loss scale: minimum",
                         "a finite number above 0", config.minimum);
  }
  state_ = {.scale = config.initial, .hysteresis = config.hysteresis};
}

void LossScaler::restore(const LossScaleState& state) {
  require<ArgumentError>(is_positive(state.scale), "state of the loss scale: scale",
                         "a finite number above 0", state.scale);
  require<ArgumentError>(state.iteration >= 0, "state of the loss scale: iteration", "0 or more",
                         state.iteration);
  require<ArgumentError>(state.last_overflow >= -1 && state.last_overflow < state.iteration,
                         "state of the loss scale: last_overflow", "-1, or an iteration before",
                         state.last_overflow);
  require<ArgumentError>(state.hysteresis > 0, "state of the loss scale: hysteresis", "1 or more",
                         state.hysteresis);
  state_ = state;
}

void LossScaler::update(bool overflow) {
  if (advance(config_, state_, overflow)) return;
  raise<StateError>(
      {.object = "loss scale",
       .expected = "finite gradients at its minimum of " + std::to_string(config_.minimum),
       .found = "an overflow in iteration " + std::to_string(state_.iteration),
       .remedy = "lower min_loss_scale or the learning rate, or train in bf16"});
}

}  // namespace mics::optim
