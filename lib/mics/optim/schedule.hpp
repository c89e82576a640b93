// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

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
