// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/loss_scaler.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace mics::optim {
namespace {

LossScaleConfig dynamic(double initial, std::int64_t window, std::int64_t hysteresis,
                        bool consecutive = false) {
  return {.dynamic = true,
          .initial = initial,
          .window = window,
          .hysteresis = hysteresis,
          .consecutive_hysteresis = consecutive};
}

// Overflows where `steps` has an x.
void expect_trace(const LossScaleConfig& config, std::string_view steps,
                  const std::vector<double>& scales, const std::vector<std::int64_t>& hysteresis) {
  LossScaler scaler(config);
  std::int64_t last_overflow = -1;
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const auto iteration = static_cast<std::int64_t>(i);
    if (steps[i] == 'x') last_overflow = iteration;

    scaler.update(steps[i] == 'x');

    const LossScaleState expected{scales[i], iteration + 1, last_overflow, hysteresis[i]};
    EXPECT_EQ(scaler.state(), expected)
        << "step " << i << ": scale " << scaler.scale() << ", expected " << scales[i]
        << ", hysteresis " << scaler.state().hysteresis << ", expected " << hysteresis[i];
    EXPECT_EQ(scaler.scale(), scales[i]);
  }
}

// What DynamicLossScaler of DeepSpeed 0.19.8 does with the same overflows, window 3, from 1024.
constexpr std::string_view overflows = "x..x...xx..........xx";

TEST(LossScalerTest, FallsWithEveryOverflowWithoutHysteresis) {
  const std::vector<double> scales{512, 512, 512, 256, 256, 256, 256, 128, 64,  64, 64,
                                   64,  128, 128, 128, 256, 256, 256, 512, 256, 128};
  const std::vector<std::int64_t> ones(21, 1);

  expect_trace(dynamic(1024, 3, 1), overflows, scales, ones);
  expect_trace(dynamic(1024, 3, 1, true), overflows, scales, ones);
}

TEST(LossScalerTest, FallsWithTheSecondOverflowWithHysteresis2) {
  expect_trace(dynamic(1024, 3, 2), overflows,
               {1024, 1024, 1024, 512, 512, 512, 512, 256,  128,  128, 128,
                128,  256,  256,  256, 512, 512, 512, 1024, 1024, 512},
               {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 1, 1});
}

TEST(LossScalerTest, FallsWithTheThirdOverflowWithHysteresis3) {
  expect_trace(dynamic(1024, 3, 3), overflows,
               {1024, 1024, 1024, 1024, 1024, 1024, 1024, 512,  256,  256, 256,
                256,  512,  512,  512,  1024, 1024, 1024, 2048, 2048, 2048},
               {2, 2, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, 3, 3, 3, 2, 1});
}

TEST(LossScalerTest, RefillsConsecutiveHysteresisWithEveryGoodStep) {
  expect_trace(dynamic(1024, 3, 2, true), overflows,
               {1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 512,  512, 512,
                512,  1024, 1024, 1024, 2048, 2048, 2048, 4096, 4096, 2048},
               {1, 2, 2, 1, 2, 2, 2, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1});
  expect_trace(dynamic(1024, 3, 3, true), overflows,
               {1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024, 1024,
                1024, 2048, 2048, 2048, 4096, 4096, 4096, 8192, 8192, 8192},
               {2, 3, 3, 2, 3, 3, 3, 2, 1, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2, 1});
}

TEST(LossScalerTest, GrowsTwiceIn2001GoodSteps) {
  LossScaler scaler(dynamic(65536, 1000, 2));
  std::vector<std::int64_t> grown;
  for (std::int64_t i = 0; i < 2001; ++i) {
    const double before = scaler.scale();

    scaler.update(false);

    if (scaler.scale() != before) grown.push_back(i);
  }
  EXPECT_EQ(grown, (std::vector<std::int64_t>{1000, 2000}));
  EXPECT_EQ(scaler.state(), (LossScaleState{262144, 2001, -1, 2}));
}

TEST(LossScalerTest, CountsTheWindowFromTheLastOverflow) {
  LossScaler scaler(dynamic(65536, 1000, 2));
  std::vector<std::int64_t> grown;
  for (std::int64_t i = 0; i < 2502; ++i) {
    const double before = scaler.scale();

    scaler.update(i == 500);

    if (scaler.scale() != before) grown.push_back(i);
  }
  EXPECT_EQ(grown, (std::vector<std::int64_t>{1501, 2501}));
  EXPECT_EQ(scaler.state(), (LossScaleState{262144, 2502, 500, 2}));
}

template <class E, class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  return "no error";
}

TEST(LossScalerTest, AnOverflowAtTheMinimumIsAnErrorThatChangesNothing) {
  LossScaler scaler(dynamic(4, 3, 2));
  for (int i = 0; i < 3; ++i) scaler.update(true);  // 4, 2, 1
  ASSERT_EQ(scaler.state(), (LossScaleState{1, 3, 2, 1}));

  for (int i = 0; i < 2; ++i) {
    const std::string message = message_of<StateError>([&] { scaler.update(true); });

    EXPECT_NE(message.find("loss scale: expected finite gradients at its minimum of 1.000000, "
                           "found an overflow in iteration 3; lower min_loss_scale"),
              std::string::npos)
        << message;
    EXPECT_EQ(scaler.state(), (LossScaleState{1, 3, 2, 1}));
  }
  scaler.update(false);
  EXPECT_EQ(scaler.state(), (LossScaleState{1, 4, 2, 1}));
}

TEST(LossScalerTest, StopsAtAMinimumBetweenPowers) {
  LossScaleConfig config = dynamic(3, 3, 1);
  config.minimum = 2;
  LossScaler scaler(config);

  scaler.update(true);
  EXPECT_EQ(scaler.scale(), 2);
  EXPECT_THROW(scaler.update(true), StateError);
}

TEST(LossScalerTest, GoesOnFromASavedStateAsIfNothingHadBeen) {
  for (const bool consecutive : {false, true}) {
    for (std::int64_t hysteresis = 1; hysteresis <= 3; ++hysteresis) {
      const LossScaleConfig config = dynamic(1024, 3, hysteresis, consecutive);
      for (std::size_t cut = 0; cut < overflows.size(); ++cut) {
        LossScaler whole(config);
        LossScaler first(config);
        for (std::size_t i = 0; i < cut; ++i) first.update(overflows[i] == 'x');
        LossScaler resumed(config);

        resumed.restore(first.state());

        for (std::size_t i = 0; i < overflows.size(); ++i) {
          whole.update(overflows[i] == 'x');
          if (i < cut) continue;
          resumed.update(overflows[i] == 'x');
          ASSERT_EQ(resumed.state(), whole.state()) << "cut " << cut << ", step " << i;
        }
      }
    }
  }
}

TEST(LossScalerTest, AStaticScaleNeverChanges) {
  LossScaler scaler({.initial = 128});

  for (int i = 0; i < 3000; ++i) scaler.update(i % 7 == 0);

  EXPECT_EQ(scaler.scale(), 128);
  EXPECT_EQ(LossScaler(LossScaleConfig{}).scale(), 1);
}

TEST(LossScalerTest, RefusesWhatCanNeverWork) {
  const auto message = [](const LossScaleConfig& config) {
    return message_of<ConfigError>([&] { (void)LossScaler(config); });
  };
  const auto contains = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };

  contains(message(dynamic(0, 1, 1)),
           "loss scale: initial: expected a finite number above 0, found 0.000000");
  contains(message(dynamic(1, 0, 1)), "loss scale: window: expected 1 step or more, found 0");
  contains(message(dynamic(1, 1, 0)), "loss scale: hysteresis: expected 1 overflow or more");
  contains(message({.dynamic = true, .factor = 1}), "loss scale: factor");
  contains(message({.dynamic = true, .minimum = std::nan("")}), "loss scale: minimum");
  EXPECT_EQ(message({.factor = 0, .window = 0, .minimum = 0}), "no error");
}

TEST(LossScalerTest, RefusesAStateThatNoScalerHad) {
  LossScaler scaler(dynamic(1024, 3, 2));
  const auto message = [&](const LossScaleState& state) {
    return message_of<ArgumentError>([&] { scaler.restore(state); });
  };

  EXPECT_NE(message({.scale = 0}).find("scale: expected a finite number above 0"),
            std::string::npos);
  EXPECT_NE(message({.iteration = -1}).find("iteration"), std::string::npos);
  EXPECT_NE(message({.iteration = 5, .last_overflow = 5}).find("last_overflow"), std::string::npos);
  EXPECT_NE(message({.hysteresis = 0}).find("hysteresis"), std::string::npos);
  EXPECT_EQ(scaler.state(), (LossScaleState{1024, 0, -1, 2}));
}

}  // namespace
}  // namespace mics::optim
