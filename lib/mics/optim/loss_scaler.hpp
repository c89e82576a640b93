// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

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
