// SPDX-License-Identifier: Apache-2.0
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

constexpr std::size_t n = 5;
constexpr std::size_t steps = 4;
using Row = std::array<double, n>;
using Table = std::array<Row, steps>;

constexpr Row start{1.0, -0.5, 0.25, 2.0, -3.0};

// Gradient of element i at step s: 0.1 * ((7 i + 3 s) mod 11 - 5) + 0.01 i.
double gradient(std::size_t s, std::size_t i) {
  return 0.1 * (static_cast<double>((i * 7 + s * 3) % 11) - 5) + 0.01 * static_cast<double>(i);
}

// Weights after each step as PyTorch 2.15.0 computes them in fp64: torch.optim where it has the
// optimizer.
// AdamW(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
constexpr Table adamw_decay{{
    {1.0089999998, -0.5094999995238095, 0.2597499994444445, 1.9880000001886793, -3.006999999285714},
    {1.0169767516099073, -0.5184220227393151, 0.26093545464767964, 1.9834213027853727,
     -3.0131151150141227},
    {1.0216214674678958, -0.5213814685707764, 0.25550565931479163, 1.9791157393165164,
     -3.011732616413029},
    {1.0209128735247048, -0.5238019123313333, 0.2555955411864243, 1.9726538162609077,
     -3.0094566962171436},
}};
// AdamW(lr=0.003, betas=(0.8, 0.95), eps=1e-4, weight_decay=0)
constexpr Table adamw_plain{{
    {1.002999400119976, -0.5029985721085197, 0.25299833425874513, 1.9970005659309564,
     -3.002997858672377},
    {1.0056495516219304, -0.5058692570384471, 0.25326094891492557, 1.9963858141213333,
     -3.00578577895618},
    {1.0071575808671422, -0.5067295156397507, 0.2514844077964766, 1.995826797485551,
     -3.0060801234498467},
    {1.0068676922594721, -0.5074279217748388, 0.2516799772653452, 1.9944543866640343,
     -3.0060984376093236},
}};
// AdamW(weight_decay=0.1) with lr = 0.01 (s + 1) and betas = (0.9 - 0.02 s, 0.99) at step s
constexpr Table adamw_cycled{{
    {1.0089999998, -0.5094999995238095, 0.2597499994444445, 1.9880000001886793, -3.006999999285714},
    {1.0228421543621007, -0.5265611556206262, 0.26006584377861053, 1.981018066281773,
     -3.01863166053449},
    {1.0314149469941887, -0.5313763561780009, 0.24194654022033354, 1.971116647648585,
     -3.0109399289335226},
    {1.0210219609101197, -0.5356694024647732, 0.24423879406593774, 1.947595088112686,
     -2.9975704500278786},
}};
// Adam(lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
constexpr Table adam_l2{{
    {1.0099999750000626, -0.5099999375003906, 0.2599999354842872, 1.9900000136986113,
     -2.9900000624996093},
    {1.0183093784118986, -0.5192152482449924, 0.25977269217504373, 1.9840383943688804,
     -2.9898953248227933},
    {1.0212605760674334, -0.521371709307443, 0.2539503578777357, 1.9777242457319615,
     -2.9838156050232265},
    {1.0185976311851317, -0.5227258662980291, 0.2534544246746789, 1.9701710486490054,
     -2.97672317981381},
}};
// SGD(lr=0.05, weight_decay=0.01)
constexpr Table sgd_decay{{
    {1.0245, -0.51025, 0.258875, 1.9725, -3.0055},
    {1.0339877499999999, -0.535494875, 0.2527455625, 1.98501375, -3.02599725},
    {1.028470756125, -0.5207271275625001, 0.23161918971875, 1.982521243125, -3.006484251375},
    {1.0079565207469374, -0.5209667639987188, 0.2505033801238906, 1.9650299825034376,
     -3.001981009249312},
}};
// SGD(lr=0.05, momentum=0.9, dampening=0.25, weight_decay=0.01)
constexpr Table sgd_momentum{{
    {1.0245, -0.51025, 0.258875, 1.9725, -3.0055},
    {1.0536658125, -0.53840865625, 0.262265421875, 1.9571353125, -3.0258229375},
    {1.0757699190703125, -0.5526745436289062, 0.24946845202929688, 1.9414481680078124,
     -3.0294788976484375},
    {1.0802602012639424, -0.565681589316061, 0.2521076284986531, 1.9142266949018407,
     -3.029383207195413},
}};
// SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
constexpr Table sgd_nesterov{{
    {1.04655, -0.519475, 0.2668625, 1.94775, -3.01045},
    {1.0844007775000002, -0.57573399875, 0.262397730625, 1.9492746375, -3.0538450725},
    {1.0994072440113751, -0.5755539140761875, 0.22375024846840624, 1.9346714878443751,
     -3.037354187431125},
    {1.0788566073396768, -0.5891041419508214, 0.24387303077020814, 1.8905678888277355,
     -3.031501134673703},
}};
// Adagrad(lr=0.05, eps=1e-10, weight_decay=0.02)
constexpr Table adagrad_decay{{
    {1.0499999999895833, -0.549999999975, 0.29999999997142857, 1.9500000000087718,
     -3.0499999999375},
    {1.067470574762136, -0.5964109947418987, 0.2707847636928101, 1.9687795940974493,
     -3.0989220039815577},
    {1.0559456746726554, -0.5719265895043127, 0.22618707339574023, 1.9631751133347257,
     -3.0620876846861798},
    {1.0247133671687714, -0.5718099342958477, 0.25711538213079577, 1.9375572396232532,
     -3.0517339323055737},
}};
// Lion, formula in tensor operations: lr=0.01, betas=(0.9, 0.99), weight_decay=0.1
constexpr Table lion_decay{{
    {1.009, -0.5095, 0.25975, 1.988, -3.0069999999999997},
    {1.0179909999999999, -0.5189904999999999, 0.24949024999999997, 1.996012, -3.0139929999999993},
    {1.0069730089999998, -0.5084715094999999, 0.23924075974999995, 1.984015988,
     -3.0009790069999993},
    {0.9959660359909996, -0.5179630379904999, 0.24900151899024997, 1.9720319720119999,
     -2.9879780279929995},
}};
// LAMB, formula in tensor operations, on the tensors {0, 1} and {2, 3, 4}: lr=0.01, betas=(0.9,
// 0.999), eps=1e-6, weight_decay=0.1, ratio in [0.01, 10]
constexpr Table lamb_free{{
    {1.0024797847996854, -0.502520053044531, 0.256619484768571, 1.9929049193904613,
     -3.006038812179792},
    {1.0042866118318412, -0.5044432296040539, 0.25791987617256296, 1.9900314847587126,
     -3.013941161565644},
    {1.0062174959904702, -0.505637379933709, 0.25153051426473266, 1.986697627652627,
     -3.0151915667195817},
    {1.0063104603062907, -0.5077047465957362, 0.2519399198393229, 1.9800631680114014,
     -3.015440202813297},
}};
// the same with the ratio in [0.15, 0.5]
constexpr Table lamb_clamped{{
    {1.0024797847996854, -0.502520053044531, 0.2549595932730806, 1.9946840705442654,
     -3.0045245292211407},
    {1.0042866118318412, -0.5044432296040539, 0.2556520921448314, 1.9931540994402879,
     -3.0087317674230736},
    {1.0062174959904702, -0.505637379933709, 0.2530420129028413, 1.9917917708995037,
     -3.009243133805285},
    {1.006281546700262, -0.5070617576740717, 0.25319144703440577, 1.989367456666216,
     -3.0093345175593478},
}};
// 0.9 average + 0.1 weights of AdamW(lr=0.01, weight_decay=0.1)
constexpr Table ema{{
    {1.0008999999800001, -0.500949999952381, 0.25097499994444444, 1.998800000018868,
     -3.0006999999285715},
    {1.0025076751429909, -0.5026972022310744, 0.25197104541476795, 1.9972621302955185,
     -3.001941511437127},
    {1.0044190543754814, -0.5045656288650446, 0.2523245068047703, 1.995447491197618,
     -3.002920621934717},
    {1.0060684362904038, -0.5064892572116735, 0.2526516102429357, 1.9931681237039471,
     -3.00357422936296},
}};

// Weights, gradient and states of `count` elements, which tensors cut at `cuts`.
template <class Master, class Gradient = Master>
class Shard {
 public:
  explicit Shard(const Optimizer& optimizer, std::vector<double> initial,
                 std::vector<std::int64_t> cuts = {}, std::int64_t first_tensor = 0)
      : optimizer_(optimizer), weights(initial.size()), gradients(initial.size()) {
    for (std::size_t i = 0; i < initial.size(); ++i) weights[i] = static_cast<Master>(initial[i]);
    for (const StateSpec& spec : optimizer.states()) {
      states.push_back(spec.initial == InitialState::weights ? weights
                                                             : std::vector<Master>(weights.size()));
    }
    runs = {{0, count(), 1, 1}};
    cuts.push_back(count());
    std::int64_t begin = 0;
    for (const std::int64_t end : cuts) {
      tensors.push_back({begin, end, first_tensor++});
      begin = end;
    }
    norms.resize(static_cast<std::size_t>(first_tensor * optimizer.norms_per_tensor()));
  }

  [[nodiscard]] std::int64_t count() const { return std::ssize(weights); }

  [[nodiscard]] Slice slice() {
    pointers_.clear();
    for (auto& state : states) pointers_.push_back(state.data());
    return {.gradient = gradients.data(),
            .master_weights = weights.data(),
            .states = pointers_,
            .compute = nullptr,
            .gradient_dtype = dtype_of<Gradient>,
            .master_dtype = dtype_of<Master>,
            .compute_dtype = dtype_of<Master>,
            .count = count(),
            .runs = runs,
            .tensors = tensors,
            .norms = norms};
  }

  void add_norms(const StepInfo& info, std::span<double> to) {
    std::vector<double> partials(
        static_cast<std::size_t>(optimizer_.norm_partials(count(), std::ssize(tensors))),
        std::numeric_limits<double>::quiet_NaN());
    optimizer_.add_norms(slice(), info, to, partials);
  }

  void step(const StepInfo& info) {
    std::fill(norms.begin(), norms.end(), 0.0);
    add_norms(info, norms);
    optimizer_.update(slice(), info);
  }

 private:
  const Optimizer& optimizer_;
  std::vector<void*> pointers_;

 public:
  std::vector<Master> weights;
  std::vector<Gradient> gradients;
  std::vector<std::vector<Master>> states;
  std::vector<state::HyperRun> runs;
  std::vector<state::TensorSegment> tensors;
  std::vector<double> norms;
};

struct Case {
  OptimizerConfig config;
  const Table& expected;
};

// All optimizers, each with the settings of its table.
std::vector<Case> cases() {
  using enum OptimizerKind;
  const auto lamb_with = [](double lowest, double highest) {
    return OptimizerConfig{.kind = OptimizerKind::lamb,
                           .learning_rate = 0.01,
                           .epsilon = 1e-6,
                           .weight_decay = 0.1,
                           .max_coefficient = highest,
                           .min_coefficient = lowest};
  };
  return {
      {{.kind = adamw, .learning_rate = 0.01, .weight_decay = 0.1}, adamw_decay},
      {{.kind = adamw, .learning_rate = 0.003, .betas = {0.8, 0.95}, .epsilon = 1e-4}, adamw_plain},
      {{.kind = adam,
        .learning_rate = 0.01,
        .betas = {0.9, 0.99},
        .epsilon = 1e-6,
        .weight_decay = 0.1},
       adam_l2},
      {{.kind = sgd, .learning_rate = 0.05, .weight_decay = 0.01}, sgd_decay},
      {{.kind = sgd,
        .learning_rate = 0.05,
        .weight_decay = 0.01,
        .momentum = 0.9,
        .dampening = 0.25},
       sgd_momentum},
      {{.kind = sgd,
        .learning_rate = 0.05,
        .weight_decay = 0.01,
        .momentum = 0.9,
        .nesterov = true},
       sgd_nesterov},
      {{.kind = adagrad, .learning_rate = 0.05, .epsilon = 1e-10, .weight_decay = 0.02},
       adagrad_decay},
      {{.kind = lion, .learning_rate = 0.01, .betas = {0.9, 0.99}, .weight_decay = 0.1},
       lion_decay},
      {lamb_with(0.01, 10), lamb_free},
      {lamb_with(0.15, 0.5), lamb_clamped},
  };
}

StepInfo info_of(const OptimizerConfig& config, std::size_t s, double gradient_scale = 1) {
  return {.step = static_cast<std::int64_t>(s) + 1,
          .learning_rate = config.learning_rate,
          .gradient_scale = gradient_scale};
}

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
