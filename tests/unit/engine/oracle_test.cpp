// SPDX-License-Identifier: Apache-2.0
// Sharded training against a dense reference in fp64 that shares no sharding code.
#include "dense_reference.hpp"
#include "layouts.hpp"
#include "small_net.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace mics::test {
namespace {

constexpr int steps = 20;

Config adamw_config() {
  Config config;
  config.optimizer = {.kind = OptimizerKind::adamw,
                      .learning_rate = 1e-2,
                      .betas = {0.9, 0.99},
                      .epsilon = 1e-8,
                      .weight_decay = 0.1};
  config.gradient_clipping = 4.0;  // between the norms of the run
  return config;
}

Config sgd_config() {
  Config config;
  config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 0.02, .weight_decay = 0.05};
  return config;
}

/// The reference's run, made once for all layouts.
struct Expected {
  Expected(const SmallNet& net, const Config& config, const Batches& batches)
      : reference(net, config) {
    for (int step = 0; step < steps; ++step) outcomes.push_back(reference.step(batches.all(step)));
  }
  DenseReference reference;
  std::vector<DenseReference::Outcome> outcomes;
};

template <class T>
void expect_run_like_reference(const SmallNet& net, const Expected& expected, Config config,
                               const Layout& layout, int micro_steps) {
  if (!in_sample()) return;
  SCOPED_TRACE(layout.text() + " micro-steps=" + std::to_string(micro_steps) + " " +
               std::string(name(dtype_of<T>)));
  const double tolerance = dtype_of<T> == DType::fp64 ? 1e-12 : 1e-5;
  layout.apply(config);
  config.compute = dtype_of<T>;
  const Batches batches;
  Engine engine(MPI_COMM_WORLD, net.model, config);
  SmallNetClient<T> client(engine, net);
  ASSERT_EQ(engine.plan().two_stage(), layout.two_stage != Switch::off);

  for (int step = 0; step < steps; ++step) {
    for (int m = 0; m < micro_steps; ++m) {
      client.micro_step(batches.part(step, m, micro_steps, engine.rank(), engine.size()),
                        m == micro_steps - 1, (step + m) % 2 == 0 ? Tied::nested : Tied::deferred);
    }
    const StepResult result = engine.step().get();

    const auto& outcome = expected.outcomes[static_cast<std::size_t>(step)];
    EXPECT_EQ(result.step, step + 1);
    EXPECT_EQ(result.samples, batches.batch);
    EXPECT_FALSE(result.skipped);
    EXPECT_TRUE(result.untouched.empty());
    EXPECT_NEAR(result.loss, outcome.loss, tolerance * outcome.loss) << "step " << step;
    EXPECT_NEAR(result.gradient_norm, outcome.norm, 10 * tolerance * outcome.norm)
        << "step " << step;
  }
  for (int i = 0; i < net.model.parameters(); ++i) {
    const ParameterSpec& spec = net.model.spec({i});
    std::vector<double> values(static_cast<std::size_t>(spec.count));
    engine.read({i}, values);
    EXPECT_LE(relative_difference(values, expected.reference.weights({i})), tolerance) << spec.name;
  }
}

/// Parameters after the run of `steps` steps in a layout, one after another, and with them how far
/// the loss went.
struct Run {
  std::vector<double> weights;
  double first_loss = 0;
  double last_loss = 0;
};
template <class T, class G>
Run train(const SmallNet& net, Config config, const Layout& layout) {
  layout.apply(config);
  config.compute = dtype_of<T>;
  if (dtype_of<G> != dtype_of<T>) config.gradient = dtype_of<G>;
  const Batches batches;
  Engine engine(MPI_COMM_WORLD, net.model, config);
  SmallNetClient<T, G> client(engine, net);
  Run run;
  for (int step = 0; step < steps; ++step) {
    for (int m = 0; m < 2; ++m) {
      client.micro_step(batches.part(step, m, 2, engine.rank(), engine.size()), m == 1,
                        Tied::nested);
    }
    const StepResult result = engine.step().get();
    EXPECT_FALSE(result.skipped) << "step " << step;
    (step == 0 ? run.first_loss : run.last_loss) = result.loss;
  }
  for (int i = 0; i < net.model.parameters(); ++i) {
    std::vector<double> values(static_cast<std::size_t>(net.model.spec({i}).count));
    engine.read({i}, values);
    run.weights.insert(run.weights.end(), values.begin(), values.end());
  }
  return run;
}

template <class T>
void expect_every_layout_like_reference(const Config& config, const std::vector<int>& divisions) {
  const SmallNet net;
  const Expected expected(net, config, Batches{});
  const auto layouts = layouts_of_job();
  ASSERT_FALSE(layouts.empty()) << "no layout is listed for " << job_size() << " ranks";

  for (const Layout& layout : layouts) {
    for (const int micro_steps : divisions) {
      expect_run_like_reference<T>(net, expected, config, layout, micro_steps);
    }
  }
}

TEST(Reference, ClipsSomeStepsAndReducesTheLoss) {
  const SmallNet net;

  const Expected expected(net, adamw_config(), Batches{});

  int clipped = 0;
  for (const auto& outcome : expected.outcomes) clipped += outcome.clipped ? 1 : 0;
  EXPECT_GT(clipped, 0);
  EXPECT_LT(clipped, steps);
  EXPECT_LT(expected.outcomes.back().loss, 0.8 * expected.outcomes.front().loss);
}

TEST(Reference, GradientIsTheDerivativeOfTheLoss) {
  // SGD of rate 1 without decay writes w - gradient.
  const SmallNet net;
  Config config;
  config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 1};
  const double tiny = 1e-6;
  const auto loss_with = [&](ParameterId parameter, std::int64_t k, double change) {
    SmallNet changed;
    ParameterOptions options = net.model.spec(parameter).options;
    Model model;
    for (int u = 0; u < net.model.units(); ++u) {
      const UnitId unit = model.unit(net.model.name(UnitId{u}));
      for (const ParameterId id : net.model.parameters(UnitId{u})) {
        ParameterSpec spec = net.model.spec(id);
        if (id == parameter) {
          const Init before = spec.options.init;
          spec.options.init = Init::function(
              [=](std::int64_t i) { return before(0, parameter, i) + (i == k ? change : 0.0); });
        }
        const auto slash = spec.name.rfind('/');
        (void)model.parameter(unit, spec.name.substr(slash + 1), spec.shape, spec.options);
      }
    }
    changed.model = model;
    return DenseReference(changed, config).step({3}).loss;
  };
  DenseReference reference(net, config);

  (void)reference.step({3});

  for (const ParameterId id : {net.e, net.w0, net.b0, net.w1, net.b1, net.gain, net.c}) {
    const ParameterSpec& spec = net.model.spec(id);
    for (const std::int64_t k : {std::int64_t{0}, spec.count / 2, spec.count - 1}) {
      const double before = spec.options.init(config.seed, id, k);
      const double gradient = (before - reference.weights(id)[static_cast<std::size_t>(k)]) /
                              spec.options.learning_rate_factor;
      const double slope = (loss_with(id, k, tiny) - loss_with(id, k, -tiny)) / (2 * tiny);
      EXPECT_NEAR(gradient, slope, 1e-6) << spec.name << " element " << k;
    }
  }
}

TEST(Oracle, AdamWInFp64EqualsTheDenseReferenceInEveryLayout) {
  expect_every_layout_like_reference<double>(adamw_config(), {1, 2, 5});
}

TEST(Oracle, AdamWInFp32EqualsTheDenseReferenceInEveryLayout) {
  expect_every_layout_like_reference<float>(adamw_config(), {1, 2, 5});
}

TEST(Oracle, SgdEqualsTheDenseReferenceInEveryLayout) {
  expect_every_layout_like_reference<double>(sgd_config(), {2});
  expect_every_layout_like_reference<float>(sgd_config(), {2});
}

struct NamedOptimizer {
  const char* name;
  OptimizerConfig config;
};
const std::vector<NamedOptimizer>& other_optimizers() {
  static const std::vector<NamedOptimizer> all{
      {"Adam with L2",
       {.kind = OptimizerKind::adam,
        .learning_rate = 1e-2,
        .betas = {0.9, 0.99},
        .weight_decay = 0.1}},
      {"AdamW without correction",
       {.kind = OptimizerKind::adamw,
        .learning_rate = 1e-3,
        .weight_decay = 0.1,
        .bias_correction = false}},
      {"SGD with momentum",
       {.kind = OptimizerKind::sgd,
        .learning_rate = 0.01,
        .weight_decay = 0.05,
        .momentum = 0.9,
        .dampening = 0.1}},
      {"SGD with Nesterov's momentum",
       {.kind = OptimizerKind::sgd,
        .learning_rate = 0.01,
        .weight_decay = 0.05,
        .momentum = 0.8,
        .nesterov = true}},
      {"Lion",
       {.kind = OptimizerKind::lion,
        .learning_rate = 1e-3,
        .betas = {0.9, 0.99},
        .weight_decay = 0.1}},
      {"Adagrad",
       {.kind = OptimizerKind::adagrad,
        .learning_rate = 0.05,
        .epsilon = 1e-10,
        .weight_decay = 0.01}},
      {"LAMB",
       {.kind = OptimizerKind::lamb,
        .learning_rate = 1e-2,
        .betas = {0.9, 0.99},
        .epsilon = 1e-6,
        .weight_decay = 0.1}},
  };
  return all;
}

TEST(Oracle, EveryOptimizerEqualsTheDenseReferenceInEveryLayout) {
  for (const NamedOptimizer& optimizer : other_optimizers()) {
    SCOPED_TRACE(optimizer.name);
    Config config;
    config.optimizer = optimizer.config;
    config.gradient_clipping = 4.0;

    expect_every_layout_like_reference<double>(config, {2});
    // The sign of an interpolated moment near 0 is a matter of rounding.
    if (optimizer.config.kind == OptimizerKind::lion) continue;
    expect_every_layout_like_reference<float>(config, {2});
  }
}

/// Weights in fp32 after a run with 16 bits somewhere stay close to those of the run without.
template <class T, class G>
void expect_close_to_fp32(const Config& config, double roundings_apart) {
  const SmallNet net;
  Config plain = config;
  plain.wire.reset();
  plain.accumulate.reset();
  plain.loss_scale = {};
  for (const Layout& layout : layouts_of_job()) {
    if (!in_sample()) continue;
    SCOPED_TRACE(layout.text() + " " + std::string(name(dtype_of<T>)) + " gradient " +
                 std::string(name(dtype_of<G>)));
    const Run wide = train<float, float>(net, plain, layout);

    const Run narrow = train<T, G>(net, config, layout);

    EXPECT_LT(narrow.last_loss, narrow.first_loss);
    EXPECT_LE(relative_difference(narrow.weights, wide.weights), roundings_apart);
  }
}

constexpr double four_of_bf16 = 4 * 0x1p-8;
constexpr double four_of_fp16 = 4 * 0x1p-11;

TEST(Oracle, RunsWith16BitsStayWithinFourRoundingsOfFp32) {
  Config config = adamw_config();
  config.gradient_clipping = 0;
  expect_close_to_fp32<bf16, bf16>(config, four_of_bf16);
  expect_close_to_fp32<bf16, float>(config, four_of_bf16);

  config.loss_scale = {.dynamic = true, .initial = 256};
  expect_close_to_fp32<fp16, fp16>(config, four_of_fp16);
  expect_close_to_fp32<fp16, float>(config, four_of_fp16);
}

TEST(Oracle, WireAndAccumulatorOf16BitsStayWithinFourRoundingsOfFp32) {
  Config config = adamw_config();
  config.gradient_clipping = 0;
  config.wire = DType::bf16;
  expect_close_to_fp32<float, float>(config, four_of_bf16);
  config.accumulate = DType::bf16;
  expect_close_to_fp32<float, float>(config, four_of_bf16);

  config.wire = DType::fp16;
  config.accumulate.reset();
  expect_close_to_fp32<float, float>(config, four_of_fp16);
  config.accumulate = DType::fp16;
  expect_close_to_fp32<float, float>(config, four_of_fp16);
}

TEST(Oracle, PersistentParametersChangeNothing) {
  // 40 elements: all vectors but b0 stay gathered, every matrix does not.
  Config config = adamw_config();
  config.persistence_threshold = 40;

  expect_every_layout_like_reference<double>(config, {2});
}

}  // namespace
}  // namespace mics::test
