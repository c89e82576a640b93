// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/schedule.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <string>

namespace mics::optim {
namespace {

constexpr double any = std::numeric_limits<double>::infinity();

void require_number(const char* key, double value, double lowest, double highest = any) {
  if (std::isfinite(value) && value >= lowest && value <= highest) return;
  std::string range = "a finite number of at least " + std::to_string(lowest);
  if (std::isfinite(highest)) range += " and at most " + std::to_string(highest);
  raise<ConfigError>({.object = std::string("schedule: ") + key,
                      .expected = range,
                      .found = std::to_string(value)});
}

void require_steps(const char* key, std::int64_t value, std::int64_t lowest) {
  if (value >= lowest) return;
  raise<ConfigError>({.object = std::string("schedule: ") + key,
                      .expected = std::to_string(lowest) + " or more",
                      .found = std::to_string(value)});
}

void check(const ScheduleConfig& config) {
  switch (config.kind) {
    case ScheduleKind::constant:
      return;
    case ScheduleKind::warmup_decay:
      require_steps("total_num_steps", config.total_num_steps, 1);
      [[fallthrough]];
    case ScheduleKind::warmup:
      require_number("warmup_min_lr", config.warmup_min_lr, 0);
      require_number("warmup_max_lr", config.warmup_max_lr, 0);
      require_steps("warmup_num_steps", config.warmup_num_steps, 1);
      return;
    case ScheduleKind::warmup_cosine:
      require_steps("total_num_steps", config.total_num_steps, 1);
      require_steps("warmup_num_steps", config.warmup_num_steps, 1);
      require_number("warmup_min_ratio", config.warmup_min_ratio, 0);
      require_number("cos_min_ratio", config.cos_min_ratio, 0);
      return;
    case ScheduleKind::lr_range_test:
      require_number("lr_range_test_min_lr", config.range_min_lr, 0);
      require_steps("lr_range_test_step_size", config.range_step_size, 1);
      require_number("lr_range_test_step_rate", config.range_step_rate, 0);
      return;
    case ScheduleKind::one_cycle:
      break;
  }
  require_number("cycle_min_lr", config.cycle_min_lr, 0);
  require_number("cycle_max_lr", config.cycle_max_lr, 0);
  require_number("decay_lr_rate", config.decay_lr_rate, 0);
  require_steps("cycle_first_step_size", config.cycle_first_step_size, 1);
  require_steps("cycle_second_step_size", config.cycle_second_step_size, 0);
  require_steps("cycle_first_stair_count", config.cycle_first_stair_count, 0);
  require_steps("cycle_second_stair_count", config.cycle_second_stair_count, -1);
  require_steps("decay_step_size", config.decay_step_size, 0);
  if (!config.cycle_momentum) return;
  require_number("cycle_min_mom", config.cycle_min_mom, 0, 1 - 1e-12);
  require_number("cycle_max_mom", config.cycle_max_mom, 0, 1 - 1e-12);
  require_number("decay_mom_rate", config.decay_mom_rate, 0);
}

}  // namespace

Schedule::Schedule(const ScheduleConfig& config, double learning_rate)
    : config_(config), learning_rate_(learning_rate) {
  require_number("learning rate of the optimizer", learning_rate, 0);
  check(config);
  config_.warmup_num_steps = std::max<std::int64_t>(2, config.warmup_num_steps);
  if (config.cycle_second_step_size == 0) {
    config_.cycle_second_step_size = config.cycle_first_step_size;
  }
  if (config.cycle_second_stair_count < 0) {
    config_.cycle_second_stair_count = config.cycle_first_stair_count;
  }
}

Rates Schedule::rates(std::int64_t step) const {
  if (step < 0) {
    raise<ArgumentError>(
        {.object = "step of a schedule", .expected = "0 or more", .found = std::to_string(step)});
  }
  const ScheduleConfig& c = config_;
  const std::int64_t index = step - 1;
  const auto decay_steps =
      static_cast<double>(std::max<std::int64_t>(1, c.total_num_steps - c.warmup_num_steps));
  const bool warm = index >= c.warmup_num_steps;
  switch (c.kind) {
    case ScheduleKind::constant:
      break;
    case ScheduleKind::warmup:
    case ScheduleKind::warmup_decay: {
      if (index < 0) return {.learning_rate = c.warmup_min_lr};
      double gamma = 1;
      if (!warm) {
        gamma = warmup(index);
      } else if (c.kind == ScheduleKind::warmup_decay) {
        gamma = std::max(0.0, static_cast<double>(c.total_num_steps - index) / decay_steps);
      }
      return {.learning_rate = c.warmup_min_lr + (c.warmup_max_lr - c.warmup_min_lr) * gamma};
    }
    case ScheduleKind::warmup_cosine: {
      if (index < 0) return {.learning_rate = 0};
      double ratio = 0;
      if (!warm) {
        ratio = c.warmup_min_ratio + warmup(index) * (1 - c.warmup_min_ratio);
      } else {
        const double progress =
            std::min(1.0, static_cast<double>(index - c.warmup_num_steps + 1) / decay_steps);
        ratio = c.cos_min_ratio +
                (1 - c.cos_min_ratio) * ((1 + std::cos(std::numbers::pi * progress)) / 2);
      }
      return {.learning_rate = learning_rate_ * std::max(0.0, ratio)};
    }
    case ScheduleKind::lr_range_test: {
      double interval = static_cast<double>(step) / static_cast<double>(c.range_step_size);
      if (c.range_staircase) interval = std::floor(interval);
      return {.learning_rate = c.range_min_lr * (1 + c.range_step_rate * interval)};
    }
    case ScheduleKind::one_cycle:
      return one_cycle(step);
  }
  return {.learning_rate = learning_rate_};
}

// How far the warm-up is at an index below its length, from 0 to 1.
double Schedule::warmup(std::int64_t index) const {
  const auto steps = static_cast<double>(config_.warmup_num_steps);
  if (config_.warmup_type == WarmupShape::linear) return static_cast<double>(index) / steps;
  return 1 / std::log(steps) * std::log(static_cast<double>(index + 1));
}

// How high the cycle is, from 0 up to 1 and down to 0. Stairs are counted in steps, as the height
// at the top may round to just below 1.
double Schedule::cycle(std::int64_t step) const {
  const auto first = static_cast<double>(config_.cycle_first_step_size);
  const auto second = static_cast<double>(config_.cycle_second_step_size);
  const double total = first + second;
  const auto at =
      static_cast<double>(step % (config_.cycle_first_step_size + config_.cycle_second_step_size));
  const double turns = static_cast<double>(step) / total;
  const double x = 1 + turns - std::floor(1 + turns);
  const double share = first / total;
  const bool rising = x <= share;
  const auto stairs = static_cast<double>(rising ? config_.cycle_first_stair_count
                                                 : config_.cycle_second_stair_count);
  if (stairs == 0) return rising ? x / share : (x - 1) / (share - 1);
  const double position = at <= first ? at * stairs / first : (total - at) * stairs / second;
  return std::floor(position) / stairs;
}

Rates Schedule::one_cycle(std::int64_t step) const {
  // DeepSpeed cycles the first beta and sets the second to this.
  constexpr double beta2 = 0.99;
  const ScheduleConfig& c = config_;
  Rates rates;
  double momentum = c.cycle_min_mom;
  const std::int64_t past = step - (c.cycle_first_step_size + c.cycle_second_step_size);
  if (step == 0) {
    rates.learning_rate = c.cycle_min_lr;
  } else if (past <= 0) {
    const double height = cycle(step);
    rates.learning_rate = c.cycle_min_lr + (c.cycle_max_lr - c.cycle_min_lr) * height;
    momentum = c.cycle_max_mom - (c.cycle_max_mom - c.cycle_min_mom) * height;
  } else {
    const double intervals =
        c.decay_step_size == 0 ? 0
                               : static_cast<double>(past) / static_cast<double>(c.decay_step_size);
    rates.learning_rate = c.cycle_min_lr / (1 + c.decay_lr_rate * intervals);
    momentum = c.cycle_max_mom * (1 + c.decay_mom_rate * intervals);
  }
  if (c.cycle_momentum) rates.betas = {momentum, beta2};
  return rates;
}

}  // namespace mics::optim
