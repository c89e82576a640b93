// SPDX-License-Identifier: Apache-2.0
#include <mics/base/half.hpp>
#include <mics/optim/update.hpp>

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <vector>

namespace mics::optim {
namespace {

constexpr std::size_t n = 5;
constexpr std::size_t steps = 4;
using Row = std::array<double, n>;

constexpr Row start{1.0, -0.5, 0.25, 2.0, -3.0};

// Gradient of element i at step s: 0.1 * ((7 i + 3 s) mod 11 - 5) + 0.01 i.
double gradient(std::size_t s, std::size_t i) {
  return 0.1 * (static_cast<double>((i * 7 + s * 3) % 11) - 5) + 0.01 * static_cast<double>(i);
}

// Weights after each step as torch.optim computes them in fp64 (PyTorch 2.15.0).
// AdamW(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
constexpr std::array<Row, steps> adamw_decay{{
    {1.0089999998000001, -0.50949999952380953, 0.25974999944444449, 1.9880000001886793,
     -3.0069999992857142},
    {1.0169767516099073, -0.51842202273931515, 0.26093545464767964, 1.9834213027853727,
     -3.0131151150141227},
    {1.0216214674678958, -0.52138146857077639, 0.25550565931479163, 1.9791157393165164,
     -3.0117326164130289},
    {1.0209128735247048, -0.52380191233133333, 0.2555955411864243, 1.9726538162609077,
     -3.0094566962171436},
}};
// AdamW(lr=0.003, betas=(0.8, 0.95), eps=1e-4, weight_decay=0)
constexpr std::array<Row, steps> adamw_plain{{
    {1.002999400119976, -0.50299857210851973, 0.25299833425874513, 1.9970005659309564,
     -3.0029978586723769},
    {1.0056495516219304, -0.5058692570384471, 0.25326094891492557, 1.9963858141213333,
     -3.0057857789561799},
    {1.0071575808671422, -0.50672951563975066, 0.25148440779647657, 1.995826797485551,
     -3.0060801234498467},
    {1.0068676922594721, -0.50742792177483875, 0.25167997726534519, 1.9944543866640343,
     -3.0060984376093236},
}};
// SGD(lr=0.05, weight_decay=0.01)
constexpr std::array<Row, steps> sgd_decay{{
    {1.0245, -0.51024999999999998, 0.25887500000000002, 1.9724999999999999, -3.0055000000000001},
    {1.0339877499999999, -0.53549487500000004, 0.25274556250000002, 1.98501375,
     -3.0259972500000001},
    {1.0284707561249999, -0.52072712756250006, 0.23161918971875001, 1.9825212431250001,
     -3.0064842513749999},
    {1.0079565207469374, -0.52096676399871877, 0.25050338012389062, 1.9650299825034376,
     -3.0019810092493122},
}};

AdamW with_step(AdamW adamw, std::size_t step) {
  adamw.bias_correction1 = 1 - std::pow(adamw.beta1, static_cast<double>(step) + 1);
  adamw.bias_correction2 = 1 - std::pow(adamw.beta2, static_cast<double>(step) + 1);
  return adamw;
}

struct State {
  std::vector<double> weights{start.begin(), start.end()};
  std::vector<double> exp_avg = std::vector<double>(n);
  std::vector<double> exp_avg_sq = std::vector<double>(n);
  std::vector<double> gradient = std::vector<double>(n);
  std::vector<state::HyperRun> runs{{0, n, 1, 1}};

  Slice slice() {
    Slice slice;
    slice.gradient = gradient.data();
    slice.master_weights = weights.data();
    slice.exp_avg = exp_avg.data();
    slice.exp_avg_sq = exp_avg_sq.data();
    slice.gradient_dtype = slice.master_dtype = slice.compute_dtype = DType::fp64;
    slice.count = n;
    slice.runs = runs;
    return slice;
  }
};

template <class Hyper, class ForStep>
void expect_trajectory(const std::array<Row, steps>& expected, const Hyper& hyper,
                       double gradient_factor, const ForStep& for_step) {
  State state;
  for (std::size_t s = 0; s < steps; ++s) {
    for (std::size_t i = 0; i < n; ++i) state.gradient[i] = gradient_factor * gradient(s, i);

    update(for_step(hyper, s), state.slice());

    for (std::size_t i = 0; i < n; ++i) {
      EXPECT_NEAR(state.weights[i], expected[s][i], 2e-15 * std::abs(expected[s][i]) + 1e-15)
          << "step " << s << ", element " << i;
    }
  }
}

TEST(UpdateTest, AdamWFollowsPyTorch) {
  expect_trajectory(adamw_decay,
                    AdamW{.learning_rate = 0.01,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .epsilon = 1e-8,
                          .weight_decay = 0.1},
                    1, with_step);
  expect_trajectory(
      adamw_plain,
      AdamW{.learning_rate = 0.003, .beta1 = 0.8, .beta2 = 0.95, .epsilon = 1e-4}, 1, with_step);
}

TEST(UpdateTest, SgdFollowsPyTorch) {
  expect_trajectory(sgd_decay, Sgd{.learning_rate = 0.05, .weight_decay = 0.01}, 1,
                    [](const Sgd& sgd, std::size_t) { return sgd; });
}

TEST(UpdateTest, ScalesTheGradientFirst) {
  expect_trajectory(adamw_decay,
                    AdamW{.learning_rate = 0.01,
                          .beta1 = 0.9,
                          .beta2 = 0.999,
                          .epsilon = 1e-8,
                          .weight_decay = 0.1,
                          .gradient_scale = 1.0 / 64},
                    64, with_step);
}

TEST(UpdateTest, FactorsOfARunStandForItsElementsOnly) {
  State state;
  state.runs = {{0, 2, 0, 1}, {2, 4, 1, 0.5}, {4, 5, 1, 0}};
  for (std::size_t i = 0; i < n; ++i) state.gradient[i] = 1;

  update(Sgd{.learning_rate = 0.5, .weight_decay = 0.25}, state.slice());

  EXPECT_EQ(state.weights[0], 1.0 - 0.5 * 1);
  EXPECT_EQ(state.weights[1], -0.5 - 0.5 * 1);
  EXPECT_EQ(state.weights[2], 0.25 - 0.25 * (1 + 0.25 * 0.25));
  EXPECT_EQ(state.weights[3], 2.0 - 0.25 * (1 + 0.25 * 2));
  EXPECT_EQ(state.weights[4], -3.0);
}

// Lengths around the blocks of the kernels, and every combination of types that an engine makes.
template <class Master, class Gradient, class Compute>
void expect_compute_copy(std::size_t count) {
  std::vector<Master> weights(count, Master(1.2345678));
  std::vector<Master> exp_avg(count);
  std::vector<Master> exp_avg_sq(count);
  std::vector<Gradient> gradients(count, Gradient(0.125));
  std::vector<Compute> compute(count);
  const std::vector<state::HyperRun> runs{{0, static_cast<std::int64_t>(count), 1, 1}};
  Slice slice{.gradient = gradients.data(),
              .master_weights = weights.data(),
              .exp_avg = exp_avg.data(),
              .exp_avg_sq = exp_avg_sq.data(),
              .compute = compute.data(),
              .gradient_dtype = dtype_of<Gradient>,
              .master_dtype = dtype_of<Master>,
              .compute_dtype = dtype_of<Compute>,
              .count = static_cast<std::int64_t>(count),
              .runs = runs};

  update(with_step(AdamW{.learning_rate = 0.01, .beta1 = 0.9, .beta2 = 0.999, .epsilon = 1e-8}, 0),
         slice);

  for (std::size_t i = 0; i < count; ++i) {
    // The first step moves each weight by the learning rate against its gradient's sign.
    ASSERT_NEAR(static_cast<double>(weights[i]), 1.2345678 - 0.01, 2e-7);
    ASSERT_EQ(static_cast<double>(compute[i]), static_cast<double>(Compute(weights[i])));
    ASSERT_EQ(weights[i], weights[0]);
  }
}

TEST(UpdateTest, WritesTheRoundedWeightsInThePass) {
  for (const std::size_t count : {1UL, 7UL, 4095UL, 4096UL, 4097UL, 20'000UL}) {
    expect_compute_copy<float, float, bf16>(count);
    expect_compute_copy<float, float, fp16>(count);
    expect_compute_copy<double, float, bf16>(count);
    expect_compute_copy<double, float, float>(count);
    expect_compute_copy<double, double, double>(count);
  }
}

TEST(UpdateTest, ZeroElementsStayZero) {
  State state;
  std::fill(state.weights.begin(), state.weights.end(), 0.0);

  for (std::size_t s = 0; s < steps; ++s) {
    update(with_step(AdamW{.learning_rate = 0.1,
                           .beta1 = 0.9,
                           .beta2 = 0.999,
                           .epsilon = 1e-8,
                           .weight_decay = 0.1},
                     s),
           state.slice());
  }

  EXPECT_EQ(state.weights, std::vector<double>(n));
  EXPECT_EQ(state.exp_avg_sq, std::vector<double>(n));
}

}  // namespace
}  // namespace mics::optim
