// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/schedule.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace mics::optim {
namespace {

constexpr double learning_rate = 0.25;  // the optimizer's

struct Case {
  ScheduleConfig config;
  std::vector<double> rates;
  std::vector<double> momenta;  // empty: left alone
};

// What the optimizer's parameter group holds in steps 0, 1, ... with the schedulers of DeepSpeed
// 0.19.8 on torch.optim.AdamW(lr=0.25), stepped after each step.
std::vector<Case> cases() {
  return {
      {{.kind = ScheduleKind::warmup,
        .warmup_min_lr = 0.001,
        .warmup_max_lr = 0.1,
        .warmup_num_steps = 6},
       {0.001, 0.001, 0.03929842791621961, 0.06170157208378038, 0.07759685583243922,
        0.08992619576868878, 0.09999999999999999, 0.1, 0.1},
       {}},
      {{.kind = ScheduleKind::warmup,
        .warmup_min_lr = 0.001,
        .warmup_max_lr = 0.1,
        .warmup_num_steps = 6,
        .warmup_type = WarmupShape::linear},
       {0.001, 0.001, 0.0175, 0.034, 0.0505, 0.067, 0.0835, 0.1, 0.1},
       {}},
      {{.kind = ScheduleKind::warmup,
        .warmup_min_lr = 0.001,
        .warmup_max_lr = 0.1,
        .warmup_num_steps = 1},
       {0.001, 0.001, 0.1, 0.1, 0.1},
       {}},
      {{.kind = ScheduleKind::warmup_decay,
        .warmup_min_lr = 0.001,
        .warmup_max_lr = 0.1,
        .warmup_num_steps = 4,
        .total_num_steps = 9},
       {0.001, 0.001, 0.0505, 0.07945564378569724, 0.1, 0.1, 0.08020000000000001, 0.0604,
        0.040600000000000004, 0.020800000000000003, 0.001, 0.001},
       {}},
      {{.kind = ScheduleKind::warmup_decay,
        .warmup_min_lr = 0.001,
        .warmup_max_lr = 0.1,
        .warmup_num_steps = 4,
        .warmup_type = WarmupShape::linear,
        .total_num_steps = 9},
       {0.001, 0.001, 0.025750000000000002, 0.0505, 0.07525000000000001, 0.1, 0.08020000000000001,
        0.0604, 0.040600000000000004, 0.020800000000000003, 0.001, 0.001},
       {}},
      {{.kind = ScheduleKind::warmup_decay,
        .warmup_min_lr = 0.001,
        .warmup_max_lr = 0.1,
        .warmup_num_steps = 5,
        .total_num_steps = 3},
       {0.001, 0.001, 0.04363697924926591, 0.06857801325411256, 0.08627395849853182, 0.1, 0.001,
        0.001},
       {}},
      {{.kind = ScheduleKind::warmup_cosine,
        .warmup_num_steps = 4,
        .total_num_steps = 9,
        .warmup_min_ratio = 0.1,
        .cos_min_ratio = 0.05},
       {0.0, 0.025, 0.1375, 0.20330828133113008, 0.25, 0.227320768082025, 0.16794576808202502,
        0.09455423191797499, 0.03517923191797501, 0.0125, 0.0125, 0.0125},
       {}},
      {{.kind = ScheduleKind::warmup_cosine,
        .warmup_num_steps = 4,
        .warmup_type = WarmupShape::linear,
        .total_num_steps = 9,
        .warmup_min_ratio = 0.1,
        .cos_min_ratio = 0.05},
       {0.0, 0.025, 0.08125, 0.1375, 0.19375, 0.227320768082025, 0.16794576808202502,
        0.09455423191797499, 0.03517923191797501, 0.0125, 0.0125, 0.0125},
       {}},
      {{.kind = ScheduleKind::warmup_cosine, .warmup_num_steps = 5, .total_num_steps = 3},
       {0.0, 0.0, 0.10766913951834826, 0.17065154862149634, 0.21533827903669653, 0.25, 2.5e-05,
        2.5e-05},
       {}},
      {{.kind = ScheduleKind::lr_range_test,
        .range_min_lr = 0.001,
        .range_step_size = 3,
        .range_step_rate = 2},
       {0.001, 0.0016666666666666666, 0.002333333333333333, 0.003, 0.0036666666666666666,
        0.004333333333333334, 0.005, 0.005666666666666667},
       {}},
      {{.kind = ScheduleKind::lr_range_test,
        .range_min_lr = 0.001,
        .range_step_size = 3,
        .range_step_rate = 2,
        .range_staircase = true},
       {0.001, 0.001, 0.001, 0.003, 0.003, 0.003, 0.005, 0.005},
       {}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .cycle_first_step_size = 4},
       {0.01, 0.0325, 0.05500000000000001, 0.0775, 0.1, 0.0775, 0.05500000000000001, 0.0325, 0.01,
        0.01, 0.01},
       {0.8, 0.875, 0.8500000000000001, 0.8250000000000001, 0.8, 0.8250000000000001,
        0.8500000000000001, 0.875, 0.9, 0.9, 0.9}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .decay_lr_rate = 0.5,
        .cycle_first_step_size = 4,
        .cycle_second_step_size = 6,
        .decay_step_size = 2,
        .cycle_min_mom = 0.85,
        .cycle_max_mom = 0.95,
        .decay_mom_rate = 0.02},
       {0.01, 0.03250000000000002, 0.055, 0.07750000000000001, 0.09999999999999999, 0.085,
        0.06999999999999999, 0.055000000000000014, 0.039999999999999994, 0.025000000000000015, 0.01,
        0.008, 0.006666666666666667, 0.005714285714285714},
       {0.85, 0.9249999999999999, 0.9, 0.875, 0.85, 0.8666666666666667, 0.8833333333333333,
        0.8999999999999999, 0.9166666666666666, 0.9333333333333332, 0.95, 0.9594999999999999, 0.969,
        0.9784999999999999}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .cycle_first_step_size = 5,
        .cycle_second_step_size = 7,
        .cycle_first_stair_count = 2,
        .cycle_second_stair_count = 3},
       {0.01, 0.01, 0.01, 0.05500000000000001, 0.05500000000000001, 0.1, 0.07, 0.07, 0.04, 0.04,
        0.01, 0.01, 0.01, 0.01},
       {0.8, 0.9, 0.9, 0.8500000000000001, 0.8500000000000001, 0.8, 0.8333333333333334,
        0.8333333333333334, 0.8666666666666667, 0.8666666666666667, 0.9, 0.9, 0.9, 0.9}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .cycle_first_step_size = 6,
        .cycle_first_stair_count = 3},
       {0.01, 0.01, 0.04, 0.04, 0.07, 0.07, 0.1, 0.07, 0.07, 0.04, 0.04, 0.01, 0.01, 0.01},
       {0.8, 0.9, 0.8666666666666667, 0.8666666666666667, 0.8333333333333334, 0.8333333333333334,
        0.8, 0.8333333333333334, 0.8333333333333334, 0.8666666666666667, 0.8666666666666667, 0.9,
        0.9, 0.9}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .cycle_first_step_size = 6,
        .cycle_first_stair_count = 3,
        .cycle_second_stair_count = 0},
       {0.01, 0.01, 0.04, 0.04, 0.07, 0.07, 0.1, 0.08499999999999998, 0.07000000000000003,
        0.05500000000000001, 0.03999999999999998, 0.02500000000000003, 0.01, 0.01},
       {0.8, 0.9, 0.8666666666666667, 0.8666666666666667, 0.8333333333333334, 0.8333333333333334,
        0.8, 0.8166666666666668, 0.8333333333333334, 0.8500000000000001, 0.8666666666666667,
        0.8833333333333333, 0.9, 0.9}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .decay_lr_rate = 0.5,
        .cycle_first_step_size = 3,
        .decay_step_size = 4,
        .cycle_momentum = false},
       {0.01, 0.040000000000000015, 0.06999999999999999, 0.1, 0.07000000000000003,
        0.03999999999999998, 0.01, 0.008888888888888889, 0.008, 0.007272727272727273},
       {}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .cycle_first_step_size = 3,
        .decay_step_size = 4,
        .decay_mom_rate = 0.1},
       {0.01, 0.040000000000000015, 0.06999999999999999, 0.1, 0.07000000000000003,
        0.03999999999999998, 0.01, 0.01, 0.01},
       {0.8, 0.8666666666666667, 0.8333333333333334, 0.8, 0.8333333333333334, 0.8666666666666667,
        0.9, 0.9225, 0.9450000000000001}},
      {{.kind = ScheduleKind::one_cycle,
        .cycle_min_lr = 0.01,
        .cycle_max_lr = 0.1,
        .decay_lr_rate = 0.5,
        .cycle_first_step_size = 3,
        .decay_step_size = 0},
       {0.01, 0.040000000000000015, 0.06999999999999999, 0.1, 0.07000000000000003,
        0.03999999999999998, 0.01, 0.01, 0.01},
       {0.8, 0.8666666666666667, 0.8333333333333334, 0.8, 0.8333333333333334, 0.8666666666666667,
        0.9, 0.9, 0.9}},
  };
}

TEST(ScheduleTest, FollowsDeepSpeed) {
  const std::vector<Case> all = cases();
  for (std::size_t c = 0; c < all.size(); ++c) {
    SCOPED_TRACE("case " + std::to_string(c));
    const Schedule schedule(all[c].config, learning_rate);
    for (std::size_t step = 0; step < all[c].rates.size(); ++step) {
      const Rates rates = schedule.rates(static_cast<std::int64_t>(step));

      EXPECT_DOUBLE_EQ(rates.learning_rate, all[c].rates[step]) << "step " << step;
      ASSERT_EQ(rates.betas.has_value(), !all[c].momenta.empty());
      if (!rates.betas) continue;
      EXPECT_DOUBLE_EQ((*rates.betas)[0], all[c].momenta[step]) << "step " << step;
      EXPECT_EQ((*rates.betas)[1], 0.99);
    }
  }
}

TEST(ScheduleTest, HasTheNumbersOfItsExample) {
  const Schedule schedule({.kind = ScheduleKind::warmup,
                           .warmup_max_lr = 1,
                           .warmup_num_steps = 4,
                           .warmup_type = WarmupShape::linear},
                          1);
  const std::vector<double> expected{0, 0, 0.25, 0.5, 0.75, 1, 1, 1};

  for (std::size_t step = 0; step < expected.size(); ++step) {
    EXPECT_EQ(schedule.rates(static_cast<std::int64_t>(step)).learning_rate, expected[step]);
  }
}

TEST(ScheduleTest, AConstantIsTheOptimizersRate) {
  const Schedule schedule(ScheduleConfig{}, learning_rate);

  for (const std::int64_t step : {std::int64_t{0}, std::int64_t{1}, INT64_MAX}) {
    EXPECT_EQ(schedule.rates(step).learning_rate, learning_rate);
    EXPECT_FALSE(schedule.rates(step).betas.has_value());
  }
}

TEST(ScheduleTest, EndsWhereItIsMeantTo) {
  const std::int64_t late = std::int64_t{1} << 50;
  for (const WarmupShape shape : {WarmupShape::logarithmic, WarmupShape::linear}) {
    const auto last = [&](ScheduleKind kind) {
      return Schedule(
                 {.kind = kind, .warmup_max_lr = 2, .warmup_type = shape, .total_num_steps = 5000},
                 2)
          .rates(late)
          .learning_rate;
    };

    EXPECT_EQ(last(ScheduleKind::warmup), 2);
    EXPECT_EQ(last(ScheduleKind::warmup_decay), 0);
    EXPECT_EQ(last(ScheduleKind::warmup_cosine), 2 * 1e-4);
  }
}

TEST(ScheduleTest, RefusesWhatCanNeverWork) {
  const auto refuses = [](const ScheduleConfig& config, const std::string& text) {
    try {
      (void)Schedule(config, learning_rate);
      FAIL() << "no error: " << text;
    } catch (const ConfigError& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
    }
  };
  using enum ScheduleKind;

  refuses({.kind = warmup, .warmup_num_steps = 0},
          "schedule: warmup_num_steps: expected 1 or more, found 0");
  refuses({.kind = warmup, .warmup_max_lr = std::nan("")},
          "schedule: warmup_max_lr: expected a finite number of at least 0.000000, found nan");
  refuses({.kind = warmup_decay}, "schedule: total_num_steps: expected 1 or more, found 0");
  refuses({.kind = warmup_cosine}, "total_num_steps");
  refuses({.kind = warmup_cosine, .total_num_steps = 5, .cos_min_ratio = -1}, "cos_min_ratio");
  refuses({.kind = lr_range_test, .range_step_size = 0}, "lr_range_test_step_size");
  refuses({.kind = lr_range_test, .range_step_rate = -1}, "lr_range_test_step_rate");
  refuses({.kind = one_cycle, .cycle_first_step_size = 0}, "cycle_first_step_size");
  refuses({.kind = one_cycle, .cycle_second_step_size = -1}, "cycle_second_step_size");
  refuses({.kind = one_cycle, .decay_step_size = -1}, "decay_step_size");
  refuses({.kind = one_cycle, .cycle_max_mom = 1}, "cycle_max_mom");
  EXPECT_NO_THROW(Schedule({.kind = one_cycle, .cycle_momentum = false, .cycle_max_mom = 1}, 1));
  EXPECT_THROW(Schedule(ScheduleConfig{}, -1), ConfigError);
  EXPECT_THROW((void)Schedule(ScheduleConfig{}, 1).rates(-1), ArgumentError);
}

}  // namespace
}  // namespace mics::optim
