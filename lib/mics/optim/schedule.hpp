// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>

namespace mics {

enum class ScheduleKind : std::uint8_t {
  constant,       ///< the optimizer's learning rate
  warmup,         ///< WarmupLR
  warmup_decay,   ///< WarmupDecayLR
  warmup_cosine,  ///< WarmupCosineLR
  lr_range_test,  ///< LRRangeTest
  one_cycle,      ///< OneCycle
};

enum class WarmupShape : std::uint8_t { logarithmic, linear };

/// A learning-rate schedule with DeepSpeed's parameters. Those that the kind does not know are
/// ignored. Source: deepspeed/runtime/lr_schedules.py.
struct ScheduleConfig {
  ScheduleKind kind = ScheduleKind::constant;

  // WarmupLR, WarmupDecayLR, WarmupCosineLR
  double warmup_min_lr = 0;
  double warmup_max_lr = 1e-3;
  std::int64_t warmup_num_steps = 1000;
  WarmupShape warmup_type = WarmupShape::logarithmic;
  std::int64_t total_num_steps = 0;  ///< required by WarmupDecayLR and WarmupCosineLR
  double warmup_min_ratio = 0;       ///< WarmupCosineLR, of the optimizer's rate
  double cos_min_ratio = 1e-4;

  // LRRangeTest
  double range_min_lr = 1e-3;
  std::int64_t range_step_size = 2000;
  double range_step_rate = 1;
  bool range_staircase = false;

  // OneCycle
  double cycle_min_lr = 0;
  double cycle_max_lr = 0;
  double decay_lr_rate = 0;
  std::int64_t cycle_first_step_size = 2000;
  std::int64_t cycle_second_step_size = 0;  ///< 0: as the first
  std::int64_t cycle_first_stair_count = 0;
  std::int64_t cycle_second_stair_count = -1;  ///< -1: as the first
  std::int64_t decay_step_size = 0;
  bool cycle_momentum = true;
  double cycle_min_mom = 0.8;
  double cycle_max_mom = 0.9;
  double decay_mom_rate = 0;
};

}  // namespace mics

namespace mics::optim {

/// What a schedule says of one optimizer step.
struct Rates {
  double learning_rate = 0;
  std::optional<std::array<double, 2>> betas = {};  ///< where the momentum is cycled
};

/// The learning rate, and under OneCycle the betas, of each optimizer step.
///
/// Steps count from 0; a skipped one does not count. DeepSpeed sets the rate of the next step after
/// each step, and its index starts at -1: step 0 has the value that a scheduler's constructor sets,
/// step k > 0 the formula's at index k - 1. Thus the steps 0 and 1 of WarmupLR both have the lowest
/// rate, step 0 of WarmupCosineLR has rate 0, whatever its least ratio, and step 0 of OneCycle has
/// the lowest momentum, where step 1 comes down from the highest.
///
/// Example: WarmupLR, linear, from 0 to 1 in 4 steps: 0, 0, 0.25, 0.5, 0.75, 1, 1, ...
/// Source: DeepSpeed:deepspeed/runtime/lr_schedules.py.
class Schedule {
 public:
  /// \param learning_rate  the optimizer's, which `constant` and WarmupCosineLR start from
  /// \throws ConfigError for values that can never work
  Schedule(const ScheduleConfig& config, double learning_rate);

  /// Local. \param step  optimizer steps taken before
  [[nodiscard]] Rates rates(std::int64_t step) const;

 private:
  [[nodiscard]] double warmup(std::int64_t index) const;
  [[nodiscard]] double cycle(std::int64_t step) const;
  [[nodiscard]] Rates one_cycle(std::int64_t step) const;

  ScheduleConfig config_;
  double learning_rate_;
};

}  // namespace mics::optim
