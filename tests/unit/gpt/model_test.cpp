// SPDX-License-Identifier: Apache-2.0
// The GPT over an engine against the same GPT with all parameters on one rank: loss, gradient norm,
// and parameters after a step, for any number of ranks and any division of the samples.

#include "small_gpt.hpp"

#include <gpt/model.hpp>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using mics::test::SmallGpt;
using Windows = std::vector<gpt::Gpt::Window>;

const gpt::GptShape shape{.layers = 2, .heads = 2, .width = 8, .positions = 6, .vocabulary = 11};

/// The windows of a global batch that rank `rank` of `size` has: dealt round, or all to rank 0.
Windows part(const std::vector<gpt::Token>& tokens, int rank, int size, bool all_to_first) {
  const auto window = static_cast<std::size_t>(shape.positions) + 1;
  Windows result;
  for (std::size_t i = 0; (i + 1) * window <= tokens.size(); ++i) {
    const int owner = all_to_first ? 0 : static_cast<int>(i) % size;
    if (owner == rank) result.emplace_back(tokens.data() + i * window, window);
  }
  return result;
}

mics::Config config_of(mics::DType compute) {
  mics::Config config;
  config.compute = compute;
  config.optimizer.kind = mics::OptimizerKind::sgd;
  config.optimizer.learning_rate = 0.5;
  config.seed = 5;
  return config;
}

/// Copies the compute parameters of the engine into a model on this rank.
template <class Real>
void copy_parameters(mics::Engine& engine, const gpt::GptIds& ids, SmallGpt<Real>& model) {
  std::size_t offset = 0;
  for (const auto& unit : ids.units) {
    for (const mics::ParameterId id : unit.parameters) {
      std::vector<double> values(static_cast<std::size_t>(engine.model().spec(id).count));
      engine.read(id, values, "compute");
      std::ranges::copy(values, model.parameters.begin() + static_cast<std::ptrdiff_t>(offset));
      offset += values.size();
    }
  }
}

double norm(const std::vector<double>& values) {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return std::sqrt(sum);
}

class ModelTest : public testing::TestWithParam<bool> {};

TEST_P(ModelTest, StepEqualsThatOfAModelOnOneRank) {
  constexpr int samples = 5;
  mics::Model declared;
  const gpt::GptIds ids = gpt::declare(declared, shape);
  mics::Engine engine(MPI_COMM_WORLD, declared, config_of(mics::DType::fp64));
  gpt::Gpt sharded(shape, ids, mics::DType::fp64, samples);
  SmallGpt<double> whole(shape, samples);
  copy_parameters(engine, ids, whole);
  const Windows mine = part(whole.window_data(), engine.rank(), engine.size(), GetParam());

  std::vector<double> evaluated{sharded.evaluate(engine, mine)};
  engine.sum(evaluated);
  sharded.micro_step(engine, mine, true);
  const mics::StepResult result = engine.step().get();
  const double loss = whole.loss_and_gradients();

  EXPECT_NEAR(evaluated[0], loss, 1e-12 * loss);
  EXPECT_EQ(result.samples, samples);
  EXPECT_NEAR(result.loss, loss / samples, 1e-12 * loss);
  const double expected_norm = norm(whole.gradients) / samples;
  EXPECT_NEAR(result.gradient_norm, expected_norm, 1e-12 * expected_norm);
  EXPECT_TRUE(result.untouched.empty());
  std::vector<double> expected = whole.parameters;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    expected[i] -= 0.5 * whole.gradients[i] / samples;
  }
  copy_parameters(engine, ids, whole);
  for (std::size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(whole.parameters[i], expected[i], 1e-13) << "element " << i;
  }
}

TEST_P(ModelTest, TwoMicroStepsEqualOne) {
  constexpr int samples = 4;
  mics::Model declared;
  const gpt::GptIds ids = gpt::declare(declared, shape);
  mics::Engine engine(MPI_COMM_WORLD, declared, config_of(mics::DType::fp64));
  gpt::Gpt sharded(shape, ids, mics::DType::fp64, samples);
  SmallGpt<double> whole(shape, samples);
  copy_parameters(engine, ids, whole);
  const Windows mine = part(whole.window_data(), engine.rank(), engine.size(), GetParam());
  const std::size_t half = mine.size() / 2;

  sharded.micro_step(engine, std::span(mine).first(half), false);
  sharded.micro_step(engine, std::span(mine).subspan(half), true);
  const mics::StepResult result = engine.step().get();
  const double loss = whole.loss_and_gradients();

  EXPECT_NEAR(result.loss, loss / samples, 1e-12 * loss);
  const double expected_norm = norm(whole.gradients) / samples;
  EXPECT_NEAR(result.gradient_norm, expected_norm, 1e-12 * expected_norm);
}

INSTANTIATE_TEST_SUITE_P(Dealt, ModelTest, testing::Values(false));
INSTANTIATE_TEST_SUITE_P(AllToRankZero, ModelTest, testing::Values(true));

TEST(ModelDTypeTest, LossFallsInEachComputeType) {
  for (const mics::DType compute : {mics::DType::fp64, mics::DType::fp32, mics::DType::bf16}) {
    mics::Model declared;
    const gpt::GptIds ids = gpt::declare(declared, shape);
    mics::Config config = config_of(compute);
    config.optimizer.kind = mics::OptimizerKind::adamw;
    config.optimizer.learning_rate = 1e-2;
    mics::Engine engine(MPI_COMM_WORLD, declared, config);
    gpt::Gpt sharded(shape, ids, compute, 4);
    const SmallGpt<float> source(shape, 4);  // of windows
    const Windows mine = part(source.window_data(), engine.rank(), engine.size(), false);

    std::vector<double> losses;
    for (int step = 0; step < 40; ++step) {
      sharded.micro_step(engine, mine, true);
      losses.push_back(engine.step().get().loss);
    }

    EXPECT_NEAR(gpt::bits_of_nats(losses.front()), std::log2(11.0), 0.1) << name(compute);
    EXPECT_LT(losses.back(), 0.6 * losses.front()) << name(compute);
  }
}

TEST(ModelArgumentTest, WindowOfAnotherLengthIsNamed) {
  mics::Model declared;
  const gpt::GptIds ids = gpt::declare(declared, shape);
  mics::Engine engine(MPI_COMM_WORLD, declared, config_of(mics::DType::fp32));
  gpt::Gpt sharded(shape, ids, mics::DType::fp32, 4);
  const std::vector<gpt::Token> tokens(6);

  try {
    (void)sharded.evaluate(engine, Windows{gpt::Gpt::Window(tokens)});
    ADD_FAILURE() << "expected an exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "gpt::Gpt: window: expected 7 tokens, found 6");
  }
  EXPECT_FALSE(engine.alive());
}

TEST(ModelArgumentTest, TokenOutsideTheVocabularyIsNamed) {
  mics::Model declared;
  const gpt::GptIds ids = gpt::declare(declared, shape);
  mics::Engine engine(MPI_COMM_WORLD, declared, config_of(mics::DType::fp32));
  gpt::Gpt sharded(shape, ids, mics::DType::fp32, 4);
  const std::vector<gpt::Token> tokens = {0, 1, 2, 11, 4, 5, 6};

  try {
    (void)sharded.evaluate(engine, Windows{gpt::Gpt::Window(tokens)});
    ADD_FAILURE() << "expected an exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_STREQ(error.what(), "gpt::Gpt: window: expected tokens below 11, found 11");
  }
}

/// What two steps of two micro-steps leave behind.
struct Outcome {
  std::vector<double> parameters;
  std::vector<double> losses;
  std::vector<double> norms;
  std::int64_t gathers = 0;  // of the second step
  std::int64_t planned_gathers = 0;
  std::size_t bytes = 0;  // of activations
};

Outcome train_twice(mics::DType compute, int prefetch, gpt::Recompute recompute) {
  const gpt::GptShape deep{.layers = 4, .heads = 2, .width = 8, .positions = 6, .vocabulary = 300};
  constexpr int samples = 5;
  mics::Model declared;
  const gpt::GptIds ids = gpt::declare(declared, deep);
  mics::Config config = config_of(compute);
  config.prefetch = prefetch;
  config.accumulation_steps = 2;
  mics::Engine engine(MPI_COMM_WORLD, declared, config);
  engine.declare_order(gpt::training_order(ids));
  gpt::Gpt model(deep, ids, compute, samples, recompute);
  const SmallGpt<float> source(deep, samples);  // of windows
  const Windows mine = part(source.window_data(), engine.rank(), engine.size(), false);
  const std::size_t half = mine.size() / 2;

  Outcome outcome;
  outcome.bytes = model.bytes();
  outcome.planned_gathers = engine.plan().count(gpt::training_leases(ids), 2).gather;
  for (int step = 0; step < 2; ++step) {
    const std::int64_t before = engine.operations().count(mics::comm::Purpose::gather);
    model.micro_step(engine, std::span(mine).first(half), false);
    model.micro_step(engine, std::span(mine).subspan(half), true);
    const mics::StepResult result = engine.step().get();
    outcome.gathers = engine.operations().count(mics::comm::Purpose::gather) - before;
    outcome.losses.push_back(result.loss);
    outcome.norms.push_back(result.gradient_norm);
  }
  for (const auto& unit : ids.units) {
    for (const mics::ParameterId id : unit.parameters) {
      std::vector<double> values(static_cast<std::size_t>(engine.model().spec(id).count));
      engine.read(id, values);
      outcome.parameters.insert(outcome.parameters.end(), values.begin(), values.end());
    }
  }
  return outcome;
}

TEST(ModelRecomputeTest, ChangesNoBitAndNoGatherButTakesLessMemory) {
  for (const mics::DType compute : {mics::DType::fp64, mics::DType::fp32, mics::DType::bf16}) {
    for (const int prefetch : {0, 1}) {
      const Outcome kept = train_twice(compute, prefetch, gpt::Recompute::no);
      const Outcome recomputed = train_twice(compute, prefetch, gpt::Recompute::yes);

      EXPECT_EQ(recomputed.losses, kept.losses) << name(compute);
      EXPECT_EQ(recomputed.norms, kept.norms) << name(compute);
      EXPECT_EQ(recomputed.parameters, kept.parameters) << name(compute);
      EXPECT_EQ(recomputed.gathers, kept.gathers);
      EXPECT_EQ(recomputed.planned_gathers, kept.planned_gathers);
      // Without prefetch the head's two leases cost a gather more than two in turn.
      EXPECT_EQ(recomputed.gathers, recomputed.planned_gathers) << "prefetch " << prefetch;
      // Three of four blocks less, each 15 C + H T + 4 elements a row.
      const double element = compute == mics::DType::fp64 ? 8 : 4;
      const double less = 3 * (15 * 8 + 2 * 6 + 4) * element * 5 * 6;
      EXPECT_NEAR(static_cast<double>(kept.bytes - recomputed.bytes), less, 0.03 * less);
    }
  }
}

}  // namespace
