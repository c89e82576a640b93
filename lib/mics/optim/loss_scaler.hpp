// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Macros.hpp>

#include <cstdint>
#include <type_traits>

namespace mics {

/// How the factor on the loss is chosen. 16-bit floats below 2^-24 vanish, so fp16 gradients are
/// computed of a multiple of the loss, which the optimizer divides out again.
struct LossScaleConfig {
  bool dynamic = false;                 ///< false: `initial` all the time
  double initial = 1;                   ///< the scale at the start
  double factor = 2;                    ///< of growth and back-off
  std::int64_t window = 1000;           ///< steps without overflow before the scale grows
  std::int64_t hysteresis = 2;          ///< overflows before the scale falls
  bool consecutive_hysteresis = false;  ///< a good step refills the hysteresis
  double minimum = 1;                   ///< an overflow at this scale is an error
};

}  // namespace mics

namespace mics::optim {

/// What a loss scaler remembers: plain data, for checkpoints and devices.
struct LossScaleState {
  double scale = 1;
  std::int64_t iteration = 0;       ///< updates so far
  std::int64_t last_overflow = -1;  ///< iteration of the last one; -1: none
  std::int64_t hysteresis = 1;      ///< the scale falls with the overflow that finds 1 here
  friend bool operator==(const LossScaleState&, const LossScaleState&) = default;
};
static_assert(std::is_trivially_copyable_v<LossScaleState>);

/// The state after a step. False, and the state as it was, if the gradients overflowed and the
/// scale cannot fall below its minimum. Nothing changes where the scale is not dynamic.
///
/// The scale grows with a good step that follows a multiple of `window` good ones in a row. The
/// hysteresis is refilled then, or by every good step if it is consecutive; a fall does not refill
/// it.
/// Source: DeepSpeed:deepspeed/runtime/fp16/loss_scaler.py, DynamicLossScaler.
[[nodiscard]] KOKKOS_INLINE_FUNCTION bool advance(const LossScaleConfig& config,
                                                  LossScaleState& state, bool overflow) {
  if (!config.dynamic) return true;
  if (overflow) {
    if (config.hysteresis == 1 || state.hysteresis == 1) {
      if (state.scale == config.minimum) return false;
      const double lower = state.scale / config.factor;
      state.scale = lower > config.minimum ? lower : config.minimum;
    } else {
      --state.hysteresis;
    }
    state.last_overflow = state.iteration;
  } else {
    if (config.consecutive_hysteresis) state.hysteresis = config.hysteresis;
    const std::int64_t good = state.iteration - state.last_overflow - 1;
    if (good > 0 && good % config.window == 0) {
      state.hysteresis = config.hysteresis;
      state.scale *= config.factor;
    }
  }
  ++state.iteration;
  return true;
}

/// The factor on the loss over the steps of a training.
///
/// Example: initial 65536, window 1000, hysteresis 2. The first overflow leaves 65536, the second
/// makes it 32768; the 1001st good step after that makes it 65536 again and refills the hysteresis.
class LossScaler {
 public:
  /// \throws ConfigError for values that can never work: no window, a factor of 1
  explicit LossScaler(const LossScaleConfig& config);

  [[nodiscard]] double scale() const { return state_.scale; }
  [[nodiscard]] const LossScaleState& state() const { return state_; }
  /// Goes on from a state that was saved. \throws ArgumentError for one that cannot have been.
  void restore(const LossScaleState& state);

  /// To be called once a step, skipped or not, on every rank with the same value.
  /// \throws StateError if the scale would have to fall below its minimum; the state is as before
  void update(bool overflow);

 private:
  LossScaleConfig config_;
  LossScaleState state_;
};

}  // namespace mics::optim
