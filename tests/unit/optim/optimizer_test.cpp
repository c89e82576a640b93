// SPDX-License-Identifier: Apache-2.0
#include "reference.hpp"
#include <mics/base/error.hpp>
#include <mics/base/half.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/for_blocks.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

namespace mics::optim {
namespace {

template <class Master, class Gradient>
void expect_table(const Case& c, double gradient_factor, double tolerance) {
  const auto optimizer = make_optimizer(c.config);
  SCOPED_TRACE(optimizer->describe());
  Shard<Master, Gradient> shard(*optimizer, {start.begin(), start.end()}, {2});
  for (std::size_t s = 0; s < steps; ++s) {
    for (std::size_t i = 0; i < n; ++i) {
      shard.gradients[i] = Gradient(gradient_factor * gradient(s, i));
    }

    shard.step(info_of(c.config, s, 1 / gradient_factor));

    for (std::size_t i = 0; i < n; ++i) {
      EXPECT_NEAR(static_cast<double>(shard.weights[i]), c.expected[s][i],
                  tolerance * (std::abs(c.expected[s][i]) + 1))
          << "step " << s << ", element " << i;
    }
  }
}

TEST(OptimizerTest, FollowsPyTorch) {
  for (const Case& c : cases()) expect_table<double, double>(c, 1, 2e-15);
}

TEST(OptimizerTest, ScalesTheGradientFirst) {
  for (const Case& c : cases()) expect_table<double, double>(c, 64, 2e-15);
}

TEST(OptimizerTest, FollowsPyTorchInFp32) {
  for (const Case& c : cases()) expect_table<float, float>(c, 1, 5e-7);
}

TEST(OptimizerTest, ComputesInTheMasterDtypeWhateverTheGradients) {
  for (const Case& c : cases()) {
    expect_table<double, float>(c, 1, 1e-6);
    expect_table<float, double>(c, 1, 5e-7);
  }
}

// The same bits as with the gradients converted beforehand.
template <class Master, class Gradient>
void expect_exact_conversion(const OptimizerConfig& config) {
  const auto optimizer = make_optimizer(config);
  SCOPED_TRACE(optimizer->describe());
  const std::int64_t count = 2 * state::block_count + 77;
  std::vector<double> initial(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < initial.size(); ++i) initial[i] = std::sin(static_cast<double>(i));
  Shard<Master, Gradient> narrow(*optimizer, initial, {100, 4000});
  Shard<Master> wide(*optimizer, initial, {100, 4000});
  for (std::size_t s = 0; s < steps; ++s) {
    for (std::size_t i = 0; i < initial.size(); ++i) {
      narrow.gradients[i] = Gradient(64 * gradient(s, i));
      wide.gradients[i] = static_cast<Master>(narrow.gradients[i]);
    }

    narrow.step(info_of(config, s, 1.0 / 64));
    wide.step(info_of(config, s, 1.0 / 64));

    for (std::size_t i = 0; i < initial.size(); ++i) {
      // The sums of LAMB's norms are taken over other chunks.
      ASSERT_NEAR(narrow.weights[i], wide.weights[i], config.kind == OptimizerKind::lamb ? 1e-7 : 0)
          << "step " << s << ", element " << i;
    }
  }
}

TEST(OptimizerTest, TakesGradientsOf16Bits) {
  for (const Case& c : cases()) {
    expect_exact_conversion<float, bf16>(c.config);
    expect_exact_conversion<float, fp16>(c.config);
    expect_exact_conversion<double, bf16>(c.config);
    expect_exact_conversion<double, fp16>(c.config);
  }
}

TEST(OptimizerTest, TakesRateAndBetasOfTheStep) {
  const auto optimizer = make_optimizer({.kind = OptimizerKind::adamw, .weight_decay = 0.1});
  Shard<double> shard(*optimizer, {start.begin(), start.end()});
  for (std::size_t s = 0; s < steps; ++s) {
    for (std::size_t i = 0; i < n; ++i) shard.gradients[i] = gradient(s, i);
    const auto step = static_cast<double>(s);

    shard.step({.step = static_cast<std::int64_t>(s) + 1,
                .learning_rate = 0.01 * (step + 1),
                .betas = {{0.9 - 0.02 * step, 0.99}}});

    for (std::size_t i = 0; i < n; ++i) {
      EXPECT_NEAR(shard.weights[i], adamw_cycled[s][i], 1e-14) << "step " << s << ", element " << i;
    }
  }
}

TEST(OptimizerTest, LeavesTheMomentsUncorrectedIfToldTo) {
  for (const OptimizerKind kind : {OptimizerKind::adamw, OptimizerKind::adam}) {
    const auto optimizer = make_optimizer(
        {.kind = kind, .betas = {0.75, 0.9375}, .epsilon = 0.25, .bias_correction = false});
    Shard<double> shard(*optimizer, {1.0});
    shard.gradients = {1.0};

    shard.step({.learning_rate = 0.5});

    EXPECT_EQ(shard.weights[0], 1.0 - 0.5 * (0.25 / (0.25 + 0.25)));
  }
}

TEST(OptimizerTest, AveragesTheWeightsInEveryPass) {
  for (Case c : cases()) {
    c.config.ema_decay = 0.9;
    const auto optimizer = make_optimizer(c.config);
    SCOPED_TRACE(optimizer->describe());
    ASSERT_EQ(optimizer->states().back().name, "ema");
    Shard<double> shard(*optimizer, {start.begin(), start.end()}, {2});
    Row average = start;
    for (std::size_t s = 0; s < steps; ++s) {
      for (std::size_t i = 0; i < n; ++i) shard.gradients[i] = gradient(s, i);

      shard.step(info_of(c.config, s));

      for (std::size_t i = 0; i < n; ++i) {
        EXPECT_NEAR(shard.weights[i], c.expected[s][i], 2e-15 * (std::abs(c.expected[s][i]) + 1));
        average[i] = 0.9 * average[i] + (1 - 0.9) * c.expected[s][i];
        EXPECT_NEAR(shard.states.back()[i], average[i], 1e-14);
        if (&c.expected == &adamw_decay) {
          EXPECT_NEAR(shard.states.back()[i], ema[s][i], 1e-14);
        }
      }
    }
  }
}

TEST(OptimizerTest, FactorsOfARunStandForItsElementsOnly) {
  const auto optimizer = make_optimizer({.kind = OptimizerKind::sgd, .weight_decay = 0.25});
  Shard<double> shard(*optimizer, {start.begin(), start.end()});
  shard.runs = {{0, 2, 0, 1}, {2, 4, 1, 0.5}, {4, 5, 1, 0}};
  shard.gradients.assign(n, 1.0);

  shard.step({.learning_rate = 0.5});

  EXPECT_EQ(shard.weights[0], 1.0 - 0.5 * 1);
  EXPECT_EQ(shard.weights[1], -0.5 - 0.5 * 1);
  EXPECT_EQ(shard.weights[2], 0.25 - 0.25 * (1 + 0.25 * 0.25));
  EXPECT_EQ(shard.weights[3], 2.0 - 0.25 * (1 + 0.25 * 2));
  EXPECT_EQ(shard.weights[4], -3.0);
}

TEST(OptimizerTest, FactorsOfARunAreThoseOfTheOptimizer) {
  for (const Case& c : cases()) {
    OptimizerConfig scaled = c.config;
    scaled.weight_decay *= 4;
    scaled.learning_rate *= 2;
    const auto plain = make_optimizer(c.config);
    const auto other = make_optimizer(scaled);
    SCOPED_TRACE(plain->describe());
    // With norms of whole tensors: the cut of the runs is that of the tensors.
    Shard<double> with_factors(*plain, {start.begin(), start.end()}, {2});
    Shard<double> first(*plain, {start.begin(), start.begin() + 2});
    Shard<double> second(*other, {start.begin() + 2, start.end()});
    with_factors.runs = {{0, 2, 1, 1}, {2, 5, 4, 2}};
    for (std::size_t s = 0; s < steps; ++s) {
      for (std::size_t i = 0; i < n; ++i) with_factors.gradients[i] = gradient(s, i);
      for (std::size_t i = 0; i < 2; ++i) first.gradients[i] = gradient(s, i);
      for (std::size_t i = 2; i < n; ++i) second.gradients[i - 2] = gradient(s, i);

      with_factors.step(info_of(c.config, s));
      first.step(info_of(c.config, s));
      second.step(info_of(scaled, s));

      for (std::size_t i = 0; i < n; ++i) {
        EXPECT_DOUBLE_EQ(with_factors.weights[i], i < 2 ? first.weights[i] : second.weights[i - 2]);
      }
    }
  }
}

// Lengths around the blocks of the kernels, and every combination of types that an engine makes.
template <class Master, class Gradient, class Compute>
void expect_compute_copy(const OptimizerConfig& config, std::size_t count) {
  const auto optimizer = make_optimizer(config);
  SCOPED_TRACE(optimizer->describe());
  Shard<Master, Gradient> shard(*optimizer, std::vector<double>(count, 1.2345678));
  shard.gradients.assign(count, Gradient(0.125));
  std::vector<Compute> compute(count);
  Slice slice = shard.slice();
  slice.compute = compute.data();
  slice.compute_dtype = dtype_of<Compute>;
  shard.add_norms(info_of(config, 0), shard.norms);

  optimizer->update(slice, info_of(config, 0));

  ASSERT_LT(shard.weights[0], Master(1.2345));
  for (std::size_t i = 0; i < count; ++i) {
    ASSERT_EQ(static_cast<double>(compute[i]), static_cast<double>(Compute(shard.weights[i])));
    ASSERT_EQ(shard.weights[i], shard.weights[0]);
  }
}

TEST(OptimizerTest, WritesTheRoundedWeightsInThePass) {
  for (const Case& c : cases()) {
    for (const std::size_t count : {1UL, 7UL, 4095UL, 4096UL, 4097UL, 20'000UL}) {
      expect_compute_copy<float, float, bf16>(c.config, count);
      expect_compute_copy<float, float, fp16>(c.config, count);
      expect_compute_copy<float, bf16, bf16>(c.config, count);
      expect_compute_copy<float, fp16, fp16>(c.config, count);
      expect_compute_copy<double, float, bf16>(c.config, count);
      expect_compute_copy<double, float, float>(c.config, count);
      expect_compute_copy<double, double, double>(c.config, count);
    }
  }
}

TEST(OptimizerTest, ZeroElementsStayZero) {
  for (Case c : cases()) {
    for (const double epsilon : {c.config.epsilon, 0.0}) {
      c.config.epsilon = epsilon;
      c.config.ema_decay = 0.9;
      const auto optimizer = make_optimizer(c.config);
      SCOPED_TRACE(optimizer->describe());
      // Two zero elements beside each other one, as in a gap, and a tensor of zeros.
      Shard<float> shard(*optimizer, {1, 0, 0, 2, 0, 0, 3, 0, 0, 0, 0, 0}, {3, 9});
      for (std::size_t s = 0; s < steps; ++s) {
        for (std::size_t i = 0; i < 9; i += 3) {
          shard.gradients[i] = static_cast<float>(gradient(s, i));
        }

        shard.step(info_of(c.config, s));

        for (std::size_t i = 0; i < 12; ++i) {
          if (i % 3 == 0 && i < 9) {
            EXPECT_TRUE(std::isfinite(shard.weights[i]));
            continue;
          }
          EXPECT_EQ(shard.weights[i], 0.0F);
          for (const auto& state : shard.states) EXPECT_EQ(state[i], 0.0F);
        }
      }
    }
  }
}

TEST(OptimizerTest, GivesEveryCutOfABufferTheSameResult) {
  const std::int64_t count = 3 * state::block_count + 1234;
  const std::vector<std::int64_t> cuts{17, 5000, 5001, 12'000};  // of tensors
  std::vector<double> initial(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < initial.size(); ++i) initial[i] = std::cos(static_cast<double>(i));
  for (const Case& c : cases()) {
    const auto optimizer = make_optimizer(c.config);
    SCOPED_TRACE(optimizer->describe());
    Shard<double> whole(*optimizer, initial, cuts);
    // Shards of which some hold parts of one tensor only, and some of several.
    const std::vector<std::int64_t> ends{11, 700, 5000, 9001, 9002, count};
    std::vector<Shard<double>> shards;
    std::int64_t begin = 0;
    for (const std::int64_t end : ends) {
      const auto first = std::upper_bound(cuts.begin(), cuts.end(), begin);
      std::vector<std::int64_t> inner;
      for (auto cut = first; cut != cuts.end() && *cut < end; ++cut) inner.push_back(*cut - begin);
      shards.emplace_back(*optimizer,
                          std::vector<double>(initial.begin() + begin, initial.begin() + end),
                          inner, first - cuts.begin());
      begin = end;
    }
    for (std::size_t s = 0; s < steps; ++s) {
      const StepInfo info = info_of(c.config, s);
      std::vector<double> norms(whole.norms.size());
      begin = 0;
      for (auto& shard : shards) {
        for (std::int64_t i = 0; i < shard.count(); ++i) {
          shard.gradients[static_cast<std::size_t>(i)] =
              gradient(s, static_cast<std::size_t>(begin + i));
        }
        begin += shard.count();
        shard.add_norms(info, norms);
      }
      for (std::size_t i = 0; i < initial.size(); ++i) whole.gradients[i] = gradient(s, i);

      for (auto& shard : shards) {
        Slice slice = shard.slice();
        slice.norms = norms;
        optimizer->update(slice, info);
      }
      whole.step(info);

      for (std::size_t j = 0; j < norms.size(); ++j) {
        EXPECT_NEAR(norms[j] / whole.norms[j], 1, 1e-13);
      }
      std::size_t at = 0;
      for (const auto& shard : shards) {
        for (const double weight : shard.weights) {
          ASSERT_NEAR(weight, whole.weights[at], c.config.kind == OptimizerKind::lamb ? 1e-14 : 0)
              << "step " << s << ", element " << at;
          ++at;
        }
      }
    }
  }
}

TEST(OptimizerTest, SumsTheSquaresOfATensorWhateverTheBlocks) {
  const auto optimizer =
      make_optimizer({.kind = OptimizerKind::lamb, .epsilon = 1e-6, .weight_decay = 0.5});
  const std::int64_t count = 2 * state::block_count + 100;
  Shard<double> shard(*optimizer, std::vector<double>(static_cast<std::size_t>(count), 2.0),
                      {1, 4096, 8000});
  std::vector<double> norms(shard.norms.size(), 5.0);

  shard.add_norms({}, norms);

  // No gradient: u is half of the weight. Exact, and added to what was there.
  const std::array<std::int64_t, 4> lengths{1, 4095, 3904, count - 8000};
  for (std::size_t t = 0; t < lengths.size(); ++t) {
    EXPECT_EQ(norms[2 * t], 5 + 4 * static_cast<double>(lengths[t]));
    EXPECT_EQ(norms[2 * t + 1], 5 + static_cast<double>(lengths[t]));
  }
}

// The sum of squares of [begin, end): in chunks of 1024 from each start of a block, in a chunk
// eight interleaved sums, the rest to the first.
double sum_in_order(const std::vector<double>& values, std::size_t begin, std::size_t end) {
  double total = 0;
  while (begin < end) {
    const std::size_t block_end = std::min(end, (begin / 4096 + 1) * 4096);
    double of_block = 0;
    while (begin < block_end) {
      const std::size_t chunk_end = std::min(block_end, begin + 1024);
      double sums[8] = {};
      const std::size_t whole = begin + (chunk_end - begin) / 8 * 8;
      for (std::size_t i = begin; i < whole; ++i) sums[(i - begin) % 8] += values[i] * values[i];
      for (std::size_t i = whole; i < chunk_end; ++i) sums[0] += values[i] * values[i];
      double chunk = 0;
      for (const double sum : sums) chunk += sum;
      of_block += chunk;
      begin = chunk_end;
    }
    total += of_block;
  }
  return total;
}

TEST(OptimizerTest, NormsHaveTheBitsOfTheDefinitionWhateverTheThreads) {
  const auto optimizer =
      make_optimizer({.kind = OptimizerKind::lamb, .epsilon = 1e-6, .weight_decay = 0.5});
  std::vector<double> initial(50'001);
  for (std::size_t i = 0; i < initial.size(); ++i) initial[i] = std::sin(static_cast<double>(i));
  Shard<double> shard(*optimizer, initial, {3, 100, 101, 9000, 30'001});

  shard.add_norms({}, shard.norms);

  for (std::size_t t = 0; t < shard.tensors.size(); ++t) {
    const double expected = sum_in_order(initial, static_cast<std::size_t>(shard.tensors[t].begin),
                                         static_cast<std::size_t>(shard.tensors[t].end));
    EXPECT_EQ(shard.norms[2 * t], expected);
    EXPECT_EQ(shard.norms[2 * t + 1], expected / 4);
  }
}

TEST(OptimizerTest, LambLeavesTheRateAloneWhereANormIsZero) {
  const auto optimizer = make_optimizer({.kind = OptimizerKind::lamb,
                                         .betas = {0.5, 0.75},
                                         .epsilon = 0.5,
                                         .bias_correction = false,
                                         .max_coefficient = 0.25});
  Shard<double> shard(*optimizer, {0.0, 1.0}, {1});
  shard.gradients = {1.0, 0.0};

  shard.step({.learning_rate = 0.5});

  EXPECT_EQ(shard.weights[0], -0.5 * (0.5 / (0.5 + 0.5)));
  EXPECT_EQ(shard.weights[1], 1.0);
}

TEST(OptimizerTest, NamesItsStates) {
  using enum OptimizerKind;
  const auto names = [](const OptimizerConfig& config) {
    std::string text;
    for (const StateSpec& spec : make_optimizer(config)->states()) {
      text += spec.name + (spec.initial == InitialState::weights ? "=weights " : " ");
    }
    return text;
  };

  EXPECT_EQ(names({.kind = adamw}), "exp_avg exp_avg_sq ");
  EXPECT_EQ(names({.kind = adam}), "exp_avg exp_avg_sq ");
  EXPECT_EQ(names({.kind = sgd}), "");
  EXPECT_EQ(names({.kind = sgd, .momentum = 0.9}), "momentum_buffer ");
  EXPECT_EQ(names({.kind = lion}), "exp_avg ");
  EXPECT_EQ(names({.kind = adagrad}), "sum ");
  EXPECT_EQ(names({.kind = lamb}), "exp_avg exp_avg_sq ");
  EXPECT_EQ(names({.kind = sgd, .ema_decay = 0.5}), "ema=weights ");
  EXPECT_EQ(names({.kind = adamw, .ema_decay = 0.5}), "exp_avg exp_avg_sq ema=weights ");
}

TEST(OptimizerTest, DescribesItselfToTheLastBit) {
  const OptimizerConfig config{.kind = OptimizerKind::lion, .weight_decay = 0.1};
  OptimizerConfig other = config;
  other.weight_decay = std::nextafter(0.1, 1.0);

  EXPECT_EQ(make_optimizer(config)->describe(), make_optimizer(config)->describe());
  EXPECT_NE(make_optimizer(config)->describe(), make_optimizer(other)->describe());
  EXPECT_EQ(make_optimizer(config)->describe().find('\n'), std::string::npos);
  EXPECT_EQ(make_optimizer(config)->describe().substr(0, 5), "lion ");
  EXPECT_EQ(make_optimizer(config)->name(), "lion");
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

TEST(OptimizerTest, RefusesWhatCanNeverWork) {
  using enum OptimizerKind;
  const auto message = [](const OptimizerConfig& config) {
    return message_of<ConfigError>([&] { (void)make_optimizer(config); });
  };
  const auto contains = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };

  contains(message({.kind = adamw, .betas = {1.0, 0.9}}),
           "adamw: betas[0]: expected a finite number of at least 0.000000 and at most");
  contains(message({.kind = lion, .weight_decay = std::nan("")}), "found nan");
  contains(message({.kind = adagrad, .epsilon = -1}), "found -1.000000");
  contains(message({.kind = sgd, .nesterov = true}),
           "sgd: nesterov: expected a momentum, and no dampening, found momentum 0.000000");
  contains(message({.kind = sgd, .momentum = 0.9, .dampening = 0.5, .nesterov = true}),
           "dampening 0.500000");
  contains(message({.kind = lamb, .max_coefficient = 0.5, .min_coefficient = 1}),
           "lamb: max_coefficient");
  contains(message({.kind = adam, .ema_decay = 1.5}), "adam: ema_decay");
  EXPECT_EQ(message({.kind = adamw, .momentum = -1, .max_coefficient = -1}), "no error");
}

TEST(OptimizerTest, RefusesASliceThatLacksArrays) {
  const auto optimizer = make_optimizer({.kind = OptimizerKind::adamw});
  Shard<float> shard(*optimizer, {1, 2, 3});
  const auto message = [&](const Slice& slice, std::int64_t step) {
    return message_of<ArgumentError>([&] { optimizer->update(slice, {.step = step}); });
  };
  const auto contains = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  Slice slice = shard.slice();

  contains(message(slice, 0), "slice of optimizer adamw: expected step 1 or later, found 0");
  slice.states = slice.states.first(1);
  contains(message(slice, 1), "expected 2 arrays of state, found 1");
  const std::array<void*, 2> missing{shard.states[0].data(), nullptr};
  slice.states = missing;
  contains(message(slice, 1), "found a null pointer among them");
  slice = shard.slice();
  slice.master_dtype = DType::bf16;
  contains(message(slice, 1), "expected fp32 or fp64, found bf16");
  contains(message_of<ArgumentError>([&] {
             optimizer->update(shard.slice(), {.step = 7, .betas = {{1.0, 0.99}}});
           }),
           "betas of step 7: expected numbers of at least 0 and below 1, found 1.000000, 0.990000");
  EXPECT_EQ(shard.weights, (std::vector<float>{1, 2, 3}));

  const auto by_norms = make_optimizer({.kind = OptimizerKind::lamb});
  Slice without_norms = shard.slice();
  without_norms.norms = {};
  contains(message_of<ArgumentError>([&] { by_norms->update(without_norms, {}); }),
           "expected at least 2 sums over tensors, found 0; add_norms on every shard");
}

/// A user's optimizer: the sign of the gradient, and how often it was positive.
class SignSgd final : public Optimizer {
 public:
  [[nodiscard]] std::string_view name() const override { return "sign_sgd"; }
  [[nodiscard]] std::vector<StateSpec> states() const override { return {{"positive"}}; }
  [[nodiscard]] std::string describe() const override { return "sign_sgd"; }
  void update(const Slice& slice, const StepInfo& info) const override {
    const auto* gradient = static_cast<const double*>(slice.gradient);
    auto* weights = static_cast<double*>(slice.master_weights);
    auto* positive = static_cast<double*>(slice.states[0]);
    state::for_blocks("sign_sgd", slice.count, [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const int sign = (gradient[i] > 0 ? 1 : 0) - (gradient[i] < 0 ? 1 : 0);
        weights[i] -= info.learning_rate * sign;
        positive[i] += sign > 0 ? 1 : 0;
      }
    });
  }
};

TEST(OptimizerTest, CanBeAUsers) {
  const SignSgd optimizer;
  Shard<double> shard(optimizer, {start.begin(), start.end()});
  shard.gradients = {1, -2, 0, 3, -4};

  shard.step({.learning_rate = 0.5});

  EXPECT_EQ(optimizer.norms_per_tensor(), 0);
  EXPECT_EQ(optimizer.norm_partials(100'000, 10), 0);
  EXPECT_EQ(shard.weights, (std::vector<double>{0.5, 0, 0.25, 1.5, -2.5}));
  EXPECT_EQ(shard.states[0], (std::vector<double>{1, 0, 0, 1, 0}));
}

}  // namespace
}  // namespace mics::optim
