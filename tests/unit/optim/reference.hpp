// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/optim/optimizer.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

// Numbers of other implementations, and a shard to compare with them.

namespace mics::optim {

inline constexpr std::size_t n = 5;
inline constexpr std::size_t steps = 4;
using Row = std::array<double, n>;
using Table = std::array<Row, steps>;

inline constexpr Row start{1.0, -0.5, 0.25, 2.0, -3.0};

/// Gradient of element i at step s: 0.1 * ((7 i + 3 s) mod 11 - 5) + 0.01 i.
inline double gradient(std::size_t s, std::size_t i) {
  return 0.1 * (static_cast<double>((i * 7 + s * 3) % 11) - 5) + 0.01 * static_cast<double>(i);
}

// Weights after each step as PyTorch 2.15.0 computes them in fp64: torch.optim where it has the
// optimizer.
// AdamW(lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
inline constexpr Table adamw_decay{{
    {1.0089999998, -0.5094999995238095, 0.2597499994444445, 1.9880000001886793, -3.006999999285714},
    {1.0169767516099073, -0.5184220227393151, 0.26093545464767964, 1.9834213027853727,
     -3.0131151150141227},
    {1.0216214674678958, -0.5213814685707764, 0.25550565931479163, 1.9791157393165164,
     -3.011732616413029},
    {1.0209128735247048, -0.5238019123313333, 0.2555955411864243, 1.9726538162609077,
     -3.0094566962171436},
}};
// AdamW(lr=0.003, betas=(0.8, 0.95), eps=1e-4, weight_decay=0)
inline constexpr Table adamw_plain{{
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
inline constexpr Table adamw_cycled{{
    {1.0089999998, -0.5094999995238095, 0.2597499994444445, 1.9880000001886793, -3.006999999285714},
    {1.0228421543621007, -0.5265611556206262, 0.26006584377861053, 1.981018066281773,
     -3.01863166053449},
    {1.0314149469941887, -0.5313763561780009, 0.24194654022033354, 1.971116647648585,
     -3.0109399289335226},
    {1.0210219609101197, -0.5356694024647732, 0.24423879406593774, 1.947595088112686,
     -2.9975704500278786},
}};
// Adam(lr=0.01, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1)
inline constexpr Table adam_l2{{
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
inline constexpr Table sgd_decay{{
    {1.0245, -0.51025, 0.258875, 1.9725, -3.0055},
    {1.0339877499999999, -0.535494875, 0.2527455625, 1.98501375, -3.02599725},
    {1.028470756125, -0.5207271275625001, 0.23161918971875, 1.982521243125, -3.006484251375},
    {1.0079565207469374, -0.5209667639987188, 0.2505033801238906, 1.9650299825034376,
     -3.001981009249312},
}};
// SGD(lr=0.05, momentum=0.9, dampening=0.25, weight_decay=0.01)
inline constexpr Table sgd_momentum{{
    {1.0245, -0.51025, 0.258875, 1.9725, -3.0055},
    {1.0536658125, -0.53840865625, 0.262265421875, 1.9571353125, -3.0258229375},
    {1.0757699190703125, -0.5526745436289062, 0.24946845202929688, 1.9414481680078124,
     -3.0294788976484375},
    {1.0802602012639424, -0.565681589316061, 0.2521076284986531, 1.9142266949018407,
     -3.029383207195413},
}};
// SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)
inline constexpr Table sgd_nesterov{{
    {1.04655, -0.519475, 0.2668625, 1.94775, -3.01045},
    {1.0844007775000002, -0.57573399875, 0.262397730625, 1.9492746375, -3.0538450725},
    {1.0994072440113751, -0.5755539140761875, 0.22375024846840624, 1.9346714878443751,
     -3.037354187431125},
    {1.0788566073396768, -0.5891041419508214, 0.24387303077020814, 1.8905678888277355,
     -3.031501134673703},
}};
// Adagrad(lr=0.05, eps=1e-10, weight_decay=0.02)
inline constexpr Table adagrad_decay{{
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
inline constexpr Table lion_decay{{
    {1.009, -0.5095, 0.25975, 1.988, -3.0069999999999997},
    {1.0179909999999999, -0.5189904999999999, 0.24949024999999997, 1.996012, -3.0139929999999993},
    {1.0069730089999998, -0.5084715094999999, 0.23924075974999995, 1.984015988,
     -3.0009790069999993},
    {0.9959660359909996, -0.5179630379904999, 0.24900151899024997, 1.9720319720119999,
     -2.9879780279929995},
}};
// LAMB, formula in tensor operations, on the tensors {0, 1} and {2, 3, 4}: lr=0.01, betas=(0.9,
// 0.999), eps=1e-6, weight_decay=0.1, ratio in [0.01, 10]
inline constexpr Table lamb_free{{
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
inline constexpr Table lamb_clamped{{
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
inline constexpr Table ema{{
    {1.0008999999800001, -0.500949999952381, 0.25097499994444444, 1.998800000018868,
     -3.0006999999285715},
    {1.0025076751429909, -0.5026972022310744, 0.25197104541476795, 1.9972621302955185,
     -3.001941511437127},
    {1.0044190543754814, -0.5045656288650446, 0.2523245068047703, 1.995447491197618,
     -3.002920621934717},
    {1.0060684362904038, -0.5064892572116735, 0.2526516102429357, 1.9931681237039471,
     -3.00357422936296},
}};

/// Weights, gradient and states of `count` elements, which tensors cut at `cuts`.
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

/// All optimizers, each with the settings of its table.
inline std::vector<Case> cases() {
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

inline StepInfo info_of(const OptimizerConfig& config, std::size_t s, double gradient_scale = 1) {
  return {.step = static_cast<std::int64_t>(s) + 1,
          .learning_rate = config.learning_rate,
          .gradient_scale = gradient_scale};
}

}  // namespace mics::optim
