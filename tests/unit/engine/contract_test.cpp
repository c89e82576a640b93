// SPDX-License-Identifier: Apache-2.0
// What the engine promises beside the right numbers.
#include "elements.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace mics::test {
namespace {

// -- calls at the wrong time
// -----------------------------------------------------------------------

TEST(LeaseTest, WithoutAFreeSlotNamesTheOpenLeasesAndTheSlotsNeeded) {
  if (job_size() == 1) return;  // everything is resident on one rank
  const Toy toy;
  Config config = toy_config();
  config.slots = 2;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  engine.begin_micro_step({.samples = 1, .last = true});
  const Lease a = engine.gather(toy.units[0]);
  {
    const Lease b = engine.gather(toy.units[1]);

    expect_error<StateError>([&] { (void)engine.gather(toy.units[2]); },
                             {"\"c\"", "\"a\"", "\"b\"", "3"});
    EXPECT_NO_THROW((void)engine.gather(toy.units[0])) << "a second lease needs no slot";
  }
  EXPECT_NO_THROW((void)engine.gather(toy.units[2])) << "the engine goes on";
}

TEST(LeaseTest, GivesNoViewAfterItsEnd) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  engine.begin_evaluation();
  Lease lease = engine.gather(toy.units[0]);

  lease.end();

  EXPECT_THROW((void)lease.view<const float**>(toy.weight[0]), StateError);
  EXPECT_NO_THROW(lease.end());
}

TEST(LeaseTest, MovedOneTakesTheRightAlong) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  engine.begin_evaluation();
  Lease first = engine.gather(toy.units[0]);

  const Lease second = std::move(first);

  EXPECT_NO_THROW((void)second.view<const float**>(toy.weight[0]));
  EXPECT_THROW((void)first.view<const float**>(toy.weight[0]), StateError);  // NOLINT
}

TEST(LeaseTest, ReadsAsNaNAfterItsEndInDebug) {
  if (job_size() == 1) return;  // everything is resident on one rank
  const Toy toy;
  Config config = toy_config();
  config.debug = true;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  engine.begin_evaluation();
  Lease lease = engine.gather(toy.units[0]);
  const auto weight = lease.view<const float**>(toy.weight[0]);
  ASSERT_EQ(to_host(weight)(3, 5), static_cast<float>(toy.initial(toy.weight[0], 3 * 17 + 5)));

  lease.end();

  engine.quiet({});
  const auto after = to_host(weight);
  EXPECT_TRUE(std::isnan(after(0, 0)));
  EXPECT_TRUE(std::isnan(after(31, 16)));
}

TEST(LeaseTest, RefusesAViewThatDoesNotFitAndNamesTheParameter) {
  Model model;
  const UnitId a = model.unit("a");
  const ParameterId w = model.parameter(a, "weight", {4, 5});
  const ParameterId left = model.parameter(a, "left", {4, 5}, {.layout = MemoryLayout::left});
  const UnitId b = model.unit("b");
  const ParameterId other = model.parameter(b, "other", {3});
  const ParameterId frozen = model.parameter(a, "frozen", {3}, {.trainable = false});
  Engine engine(MPI_COMM_WORLD, model, toy_config());
  engine.begin_micro_step({.samples = 1, .last = true});
  {
    const Lease lease = engine.gather(a);
    auto scope = engine.gradient(a);
    const auto fails = [&](auto&& view, const std::string& object, const std::string& expected,
                           const std::string& found) {
      expect_error<ArgumentError>([&] { view(lease); }, {object, expected, found});
    };

    fails([&](auto& h) { (void)h.template view<const double**>(w); }, "a/weight", "fp32", "fp64");
    fails([&](auto& h) { (void)h.template view<const bf16**>(w); }, "a/weight", "fp32", "bf16");
    fails([&](auto& h) { (void)h.template view<const float*>(w); }, "a/weight", "2", "1");
    fails([&](auto& h) { (void)h.template view<const float***>(w); }, "a/weight", "2", "3");
    fails([&](auto& h) { (void)h.template view<const float**, Kokkos::LayoutLeft>(w); }, "a/weight",
          "LayoutRight", "LayoutLeft");
    fails([&](auto& h) { (void)h.template view<const float**>(left); }, "a/left", "LayoutLeft",
          "LayoutRight");
    fails([&](auto& h) { (void)h.template view<const float*>(other); }, "b/other", "b", "a");
    EXPECT_THROW((void)scope.view<double**>(w), ArgumentError);
    EXPECT_THROW((void)scope.view<float*>(other), ArgumentError);
    expect_error<ArgumentError>([&] { (void)scope.view<float*>(frozen); }, {"a/frozen", "frozen"});
    EXPECT_THROW((void)lease.view<const float*>({99}), ArgumentError);
    EXPECT_THROW((void)lease.view<const float*>({-1}), ArgumentError);
    EXPECT_NO_THROW((void)lease.view<const float*>(frozen));
    scope.reduce();
  }
  EXPECT_THROW((void)engine.gather({7}), ArgumentError);
  EXPECT_THROW((void)engine.gather({-1}), ArgumentError);
  EXPECT_THROW((void)engine.gradient({2}), ArgumentError);
}

TEST(GradientScopeTest, IsReducedOnce) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  engine.begin_micro_step({.samples = 1, .last = true});
  auto scope = engine.gradient(toy.units[0]);

  scope.reduce();

  EXPECT_THROW(scope.reduce(), StateError);
  EXPECT_THROW(scope.defer(), StateError);
  EXPECT_THROW((void)scope.view<float**>(toy.weight[0]), StateError);
  expect_error<StateError>([&] { (void)engine.gradient(toy.units[0]); }, {"\"a\""});
}

TEST(GradientScopeTest, NeedsAMicroStep) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());

  EXPECT_THROW((void)engine.gradient(toy.units[0]), StateError);
  (void)toy_step(engine, toy, 1);
  EXPECT_THROW((void)engine.gradient(toy.units[0]), StateError) << "after step()";
  engine.begin_evaluation();
  EXPECT_THROW((void)engine.gradient(toy.units[0]), StateError) << "in an evaluation";
}

TEST(GradientScopeTest, WithoutAFreeSlotIsAnErrorThatNamesTheOpenOnes) {
  const Toy toy;
  Config config = toy_config();
  config.slots = 1;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  engine.begin_micro_step({.samples = 1, .last = true});
  auto a = engine.gradient(toy.units[0]);

  expect_error<StateError>([&] { (void)engine.gradient(toy.units[1]); }, {"\"b\"", "\"a\""});

  a.reduce();
  auto b = engine.gradient(toy.units[1]);
  b.reduce();
}

TEST(GradientScopeTest, OverwriteInDebugShowsAForgottenElement) {
  const Toy toy;
  Config config = toy_config();
  config.debug = true;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  engine.begin_micro_step({.samples = 1, .last = true});
  HostScope scope = engine.gradient(toy.units[0], GradientMode::overwrite);
  const auto dw = scope.view<float**>(toy.weight[0]);
  const auto db = scope.view<float*>(toy.bias[0]);
  for (std::size_t i = 0; i < 32; ++i) {
    for (std::size_t j = 0; j < 17; ++j) dw(i, j) = 1;
  }
  for (std::size_t i = 0; i < 16; ++i) db(i) = 1;  // 17 elements

  scope.reduce();
  const StepResult result = engine.step().get();

  EXPECT_TRUE(result.skipped);
  EXPECT_TRUE(std::isnan(result.gradient_norm));
}

TEST(StepTest, RefusesToStepTooEarlyAndGoesOnAfterwards) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());

  EXPECT_THROW(engine.step(), StateError) << "before any micro-step";
  engine.begin_micro_step({.samples = 1, .last = false});
  EXPECT_THROW(engine.step(), StateError) << "before the last micro-step";
  engine.begin_micro_step({.samples = 1, .last = true});
  auto open = engine.gradient(toy.units[0]);
  expect_error<StateError>([&] { engine.step(); }, {"\"a\""});
  open.defer();
  expect_error<StateError>([&] { engine.step(); }, {"\"a\""});
  engine.gradient(toy.units[0]).reduce();
  {
    const Lease lease = engine.gather(toy.units[1]);
    expect_error<StateError>([&] { engine.step(); }, {"\"b\""});
  }
  EXPECT_EQ(engine.step().get().samples, 2 * job_size());
  EXPECT_THROW(engine.step(), StateError) << "twice";
  EXPECT_TRUE(engine.alive());
}

TEST(StepTest, RefusesNegativeSamplesAndAMicroStepAfterTheLast) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());

  EXPECT_THROW(engine.begin_micro_step({.samples = -1, .last = true}), Error);
  engine.begin_micro_step({.samples = 1, .last = true});
  EXPECT_THROW(engine.begin_micro_step({.samples = 1, .last = true}), StateError);
}

// -- who contributes
// -------------------------------------------------------------------------------

TEST(ContributionTest, UnitWithoutOneIsLeftUntouchedAndReported) {
  const Toy toy;
  Config config = toy_config();
  config.optimizer = {.kind = OptimizerKind::adamw, .learning_rate = 0.1, .weight_decay = 0.5};
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  for (int step = 0; step < 3; ++step) {
    engine.begin_micro_step({.samples = 1, .last = true});
    for (const std::size_t u : {3U, 1U, 0U}) backward_unit(engine, toy, u, 1);

    const StepResult result = engine.step().get();

    EXPECT_FALSE(result.skipped);
    EXPECT_EQ(result.untouched, (std::vector<std::string>{"c"}));
  }
  const auto weight = values_of(engine, toy.weight[2]);
  for (std::size_t i = 0; i < weight.size(); ++i) {
    ASSERT_EQ(weight[i], toy.initial(toy.weight[2], static_cast<std::int64_t>(i)));
  }
  EXPECT_NE(values_of(engine, toy.weight[1])[0], toy.initial(toy.weight[1], 0));
}

TEST(ContributionTest, OfOneReplicaAloneCounts) {
  // Shard groups of 1 rank, and of 2 where there are 4 ranks; the last group alone contributes.
  for (const int p : {1, 2}) {
    if (job_size() <= p || job_size() % p != 0) continue;
    SCOPED_TRACE("p=" + std::to_string(p));
    const Toy toy;
    Config config = toy_config();
    config.preset = Preset::mics;
    config.shard_size = p;
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    const bool last_group =
        engine.plan().layout().place(engine.rank()).group == engine.plan().layout().replicas() - 1;

    for (int step = 0; step < 2; ++step) {
      engine.begin_micro_step({.samples = 1, .last = true});
      backward_unit(engine, toy, 0, 1);
      if (last_group) backward_unit(engine, toy, 2, static_cast<float>(job_size()));
      const StepResult result = engine.step().get();

      EXPECT_EQ(result.untouched.size(), 2U);  // b and d
    }

    // The group's p ranks each add W, divided by W samples, in two steps.
    EXPECT_EQ(values_of(engine, toy.bias[2])[5], toy.initial(toy.bias[2], 5) - 2 * p);
    EXPECT_EQ(values_of(engine, toy.bias[0])[5], toy.initial(toy.bias[0], 5) - 2);
    EXPECT_EQ(values_of(engine, toy.bias[1])[5], toy.initial(toy.bias[1], 5));
  }
}

TEST(ContributionTest, InAnEarlierMicroStepIsNotLost) {
  const Toy toy;
  for (const Preset preset : {Preset::ddp, Preset::zero2, Preset::zero3}) {
    SCOPED_TRACE(name(preset));
    Config config = toy_config();
    config.preset = preset;
    Engine engine(MPI_COMM_WORLD, toy.model, config);

    // a in the first micro-step only, b in both, c in the last only.
    engine.begin_micro_step({.samples = 1, .last = false});
    backward_unit(engine, toy, 1, 2);
    backward_unit(engine, toy, 0, 4);
    engine.begin_micro_step({.samples = 1, .last = true});
    backward_unit(engine, toy, 2, 8);
    backward_unit(engine, toy, 1, 2);
    const StepResult result = engine.step().get();

    EXPECT_EQ(result.samples, 2 * job_size());
    EXPECT_EQ(result.untouched, (std::vector<std::string>{"d"}));
    EXPECT_EQ(values_of(engine, toy.bias[0])[16], toy.initial(toy.bias[0], 16) - 2);
    EXPECT_EQ(values_of(engine, toy.bias[1])[16], toy.initial(toy.bias[1], 16) - 2);
    EXPECT_EQ(values_of(engine, toy.bias[2])[16], toy.initial(toy.bias[2], 16) - 4);
  }
}

// -- steps that do nothing
// -------------------------------------------------------------------------

Config momentum_config() {
  Config config = toy_config();
  config.optimizer = {.kind = OptimizerKind::adamw, .learning_rate = 0.01, .weight_decay = 0.1};
  return config;
}

TEST(SkipTest, NonFiniteGradientOnOneRankSkipsOnAllAndLeavesNoTrace) {
  const Toy toy;
  Engine undisturbed(MPI_COMM_WORLD, toy.model, momentum_config());
  (void)toy_step(undisturbed, toy, 0.5F);
  (void)toy_step(undisturbed, toy, 0.25F);
  const auto expected = all_values(undisturbed);
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
    (void)toy_step(engine, toy, 0.5F);
    const auto before = all_values(engine);

    engine.begin_micro_step({.samples = 1, .last = true});
    for (std::size_t u = 0; u < 4; ++u) {
      backward_unit(engine, toy, u, u == 2 && job_rank() == job_size() - 1 ? bad : 1.0F);
    }
    const StepResult result = engine.step().get();

    EXPECT_TRUE(result.skipped);
    EXPECT_FALSE(std::isfinite(result.gradient_norm));
    EXPECT_EQ(result.step, 1);
    EXPECT_EQ(all_values(engine), before);
    EXPECT_EQ(toy_step(engine, toy, 0.25F).step, 2);
    EXPECT_EQ(all_values(engine), expected) << "moments or counters were touched";
  }
}

TEST(SkipTest, NoSamplesAtAllSkips) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  const auto before = all_values(engine);

  engine.begin_micro_step({.samples = 0, .last = true});
  for (std::size_t u = 0; u < 4; ++u) backward_unit(engine, toy, u, 0);
  const StepResult result = engine.step().get();

  EXPECT_TRUE(result.skipped);
  EXPECT_EQ(result.samples, 0);
  EXPECT_EQ(result.step, 0);
  EXPECT_EQ(all_values(engine), before);
}

TEST(SkipTest, AnUnusedLossIsClearedForTheNextStep) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  for (int step = 0; step < 3; ++step) {
    engine.begin_micro_step({.samples = 2, .last = true});
    add_loss(engine, 3.0 * (job_rank() + 1));
    backward_unit(engine, toy, 0, 1);

    const StepResult result = engine.step().get();

    EXPECT_DOUBLE_EQ(result.loss, 3.0 * (job_size() + 1) / 4);
  }
}

TEST(ClippingTest, ShortensTheStepToTheLimitAndReportsTheNormBefore) {
  const Toy toy(1);
  Config config = toy_config();
  config.compute = DType::fp32;
  config.gradient_clipping = 3;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  const double elements = 32 * 17 + 17;

  const StepResult result = toy_step(engine, toy, 2);

  EXPECT_NEAR(result.gradient_norm, 2 * std::sqrt(elements), 1e-9);
  double square = 0;
  for (const ParameterId id : {toy.weight[0], toy.bias[0]}) {
    const auto after = values_of(engine, id);
    for (std::size_t i = 0; i < after.size(); ++i) {
      square += std::pow(after[i] - toy.initial(id, static_cast<std::int64_t>(i)), 2);
    }
  }
  EXPECT_NEAR(std::sqrt(square), 3, 1e-4);
}

TEST(LearningRateTest, FollowsItsTableAndKeepsTheLast) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  engine.set_learning_rates(std::vector<double>{0.5, 0.25});
  std::vector<double> rates;

  for (int step = 0; step < 4; ++step) rates.push_back(toy_step(engine, toy, 1).learning_rate);

  EXPECT_EQ(rates, (std::vector<double>{0.5, 0.25, 0.25, 0.25}));
  EXPECT_EQ(values_of(engine, toy.bias[0])[0], toy.initial(toy.bias[0], 0) - 1.25);
  EXPECT_THROW(engine.set_learning_rates({}), ConfigError);
  EXPECT_THROW(engine.set_learning_rates(std::vector<double>{0.1, std::nan("")}), ConfigError);
  EXPECT_THROW(engine.set_learning_rates(std::vector<double>{-0.1}), ConfigError);
}

// -- order, slots, evaluation
// ----------------------------------------------------------------------

struct Log {
  std::vector<std::string> warnings;
  [[nodiscard]] LogSink sink() {
    return [this](LogLevel level, std::string_view text) {
      if (level == LogLevel::warning) warnings.emplace_back(text);
    };
  }
  /// On all ranks together.
  [[nodiscard]] int count() const {
    int all = static_cast<int>(warnings.size());
    MPI_Allreduce(MPI_IN_PLACE, &all, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    return all;
  }
};

/// A step that gathers in the given order and checks every gathered value.
void step_in_order(Engine& engine, const Toy& toy, const std::vector<std::size_t>& order,
                   double expected_change) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (const std::size_t u : order) {
    const Lease lease = engine.gather(toy.units[u]);
    EXPECT_EQ(count_differences(
                  toy.model, lease, toy.weight[u], engine.config(),
                  [&](std::int64_t i) { return toy.initial(toy.weight[u], i) + expected_change; }),
              0)
        << "unit " << u;
  }
  for (std::size_t u = 4; u-- > 0;) backward_unit(engine, toy, u, 1);
  (void)engine.step();
}

TEST(OrderTest, ChangedOneStaysCorrectIsReportedOnceAndFollowedAnew) {
  const Toy toy;
  Log log;
  for (const int slots : {2, 3}) {
    log.warnings.clear();
    Config config = toy_config();
    config.slots = slots;
    Engine engine(MPI_COMM_WORLD, toy.model, config, {}, log.sink());
    int step = 0;
    const auto run = [&](const std::vector<std::size_t>& order) {
      step_in_order(engine, toy, order, -step);
      ++step;
    };

    for (int i = 0; i < 3; ++i) run({0, 1, 2, 3});
    EXPECT_EQ(log.count(), 0);
    run({2, 0, 3, 1});
    const int warnings = log.count();
    run({2, 0, 3, 1});
    const auto before = engine.operations().count(comm::Purpose::gather);
    run({2, 0, 3, 1});
    const auto made = engine.operations().count(comm::Purpose::gather) - before;
    run({3});
    run({0, 0, 1, 1, 2, 2, 3, 3, 0});

    if (job_size() > 1) {
      EXPECT_GE(warnings, 1);
      EXPECT_LE(log.warnings.size(), 1U) << log.warnings.back();
      std::vector<UnitId> order;
      for (const int u : {2, 0, 3, 1, 3, 2, 1, 0})
        order.push_back(toy.units[static_cast<std::size_t>(u)]);
      EXPECT_EQ(made, engine.plan().count(order, 1).gather) << "the new order is not followed";
    } else {
      EXPECT_EQ(warnings, 0);
    }
  }
}

TEST(OrderTest, StepMayComeWhilePrefetchedUnitsAreUnderWay) {
  const Toy toy;
  Config config = toy_config();
  config.slots = 3;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  for (int step = 0; step < 3; ++step) step_in_order(engine, toy, {0, 1, 2, 3}, -step);
  for (int round = 0; round < 3; ++round) {
    // The order begins with a, so that b and c are prefetched, but only a is used.
    engine.begin_micro_step({.samples = 1, .last = true});
    backward_unit(engine, toy, 0, 1);
    EXPECT_EQ(engine.step().get().untouched.size(), 3U);

    step_in_order(engine, toy, {1, 2, 3}, -3 - round);
  }
  EXPECT_EQ(values_of(engine, toy.bias[0])[0], toy.initial(toy.bias[0], 0) - 9);
  EXPECT_EQ(values_of(engine, toy.bias[3])[0], toy.initial(toy.bias[3], 0) - 6);
}

TEST(OrderTest, DeclaredOneIsFollowedFromTheFirstStep) {
  const Toy toy;
  Log log;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config(), {}, log.sink());
  std::vector<UnitId> order(toy.units);
  order.insert(order.end(), toy.units.rbegin(), toy.units.rend());
  engine.declare_order(order);

  for (int step = 0; step < 3; ++step) {
    const auto before = engine.operations().count(comm::Purpose::gather);
    step_in_order(engine, toy, {0, 1, 2, 3}, -step);
    EXPECT_EQ(engine.operations().count(comm::Purpose::gather) - before,
              engine.plan().count(order, 1).gather)
        << "step " << step;
  }

  EXPECT_EQ(log.count(), 0);
}

TEST(EvaluationTest, BetweenStepsReadsTheNewValuesAndLeavesTrainingAlone) {
  const Toy toy;
  Log log;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config(), {}, log.sink());
  std::vector<UnitId> order(toy.units);
  order.insert(order.end(), toy.units.rbegin(), toy.units.rend());
  for (int step = 0; step < 5; ++step) {
    const auto before = engine.operations().count(comm::Purpose::gather);
    step_in_order(engine, toy, {0, 1, 2, 3}, -step);
    const auto made = engine.operations().count(comm::Purpose::gather) - before;
    // The evaluation may leave a unit in a slot that the step can use.
    const auto planned = engine.plan().count(order, 1).gather;
    EXPECT_TRUE(step == 0 || made <= planned) << made << " gathers, planned " << planned;
    EXPECT_TRUE(step != 4 || made == planned) << made << " gathers, planned " << planned;
    if (step == 3) continue;
    for (int pass = 0; pass < 2; ++pass) {
      engine.begin_evaluation();
      for (const std::size_t u : {3U, 1U, 2U}) {
        const Lease lease = engine.gather(toy.units[u]);
        EXPECT_EQ(count_differences(
                      toy.model, lease, toy.bias[u], engine.config(),
                      [&](std::int64_t i) { return toy.initial(toy.bias[u], i) - (step + 1); }),
                  0);
      }
    }
  }
  EXPECT_EQ(log.count(), 0) << log.warnings.size();
}

TEST(KeepTest, UnitThatIsGatheredAgainAtOnceCostsNoGather) {
  const Toy toy;
  Config config = toy_config();
  config.slots = 2;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  engine.begin_evaluation();
  const auto count = [&] { return engine.operations().count(comm::Purpose::gather); };
  (void)engine.gather(toy.units[0], Keep::yes);
  (void)engine.gather(toy.units[1]);
  (void)engine.gather(toy.units[2]);  // in place of b, not of a
  const auto before = count();

  const Lease lease = engine.gather(toy.units[0]);

  EXPECT_EQ(count(), before);
  EXPECT_EQ(host_view<const float**>(lease, toy.weight[0])(0, 1),
            static_cast<float>(toy.initial(toy.weight[0], 1)));
}

// A unit's kernels can write while the units before it are still being reduced.
TEST(GradientSlotTest, UnitsOneAfterAnotherTakeSlotsInTurn) {
  for (const int slots : {1, 2, 3}) {
    SCOPED_TRACE(slots);
    const Toy toy;
    Config config = toy_config();
    config.slots = slots;
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    std::vector<const float*> places;
    for (int step = 0; step < 3; ++step) {
      engine.begin_micro_step({.samples = 1, .last = true});
      for (std::size_t u = toy.units.size(); u-- > 0;) {
        auto scope = engine.gradient(toy.units[u]);
        places.push_back(scope.view<float**>(toy.weight[u]).data());
        scope.reduce();
      }
      (void)engine.step().get();
    }

    const auto period = static_cast<std::size_t>(slots);
    for (std::size_t i = 0; i < places.size(); ++i) {
      const auto first = places.begin() + static_cast<std::ptrdiff_t>(i);
      const std::size_t end = std::min(i + period, places.size());
      EXPECT_EQ(
          std::set<const float*>(first, places.begin() + static_cast<std::ptrdiff_t>(end)).size(),
          end - i);
      if (i >= period) {
        EXPECT_EQ(places[i], places[i - period]);
      }
    }
  }
}

// -- where it runs
// ---------------------------------------------------------------------------------

// A kernel; nvcc takes none that stands inside a test.
template <class To, class From>
struct AddRows {
  To to;
  From from;
  KOKKOS_FUNCTION void operator()(int i) const {
    if constexpr (To::rank() == 1) {
      to(i) += from(i);
    } else {
      for (std::size_t j = 0; j < to.extent(1); ++j) to(i, j) += from(i, j);
    }
  }
};

TEST(ExecutionTest, KernelsOfTwoInstancesReadAndWriteTheSameUnit) {
  using Space = Kokkos::DefaultExecutionSpace;
  const auto instances = Kokkos::Experimental::partition_space(Space(), 1, 1);
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config(), instances[0]);
  for (int step = 0; step < 3; ++step) {
    engine.begin_micro_step({.samples = 1, .last = true});
    for (std::size_t u = 0; u < 4; ++u) {
      Lease lease = engine.gather(toy.units[u], instances[0]);
      lease.also_on(instances[1]);
      auto scope = engine.gradient(toy.units[u], instances[1]);
      scope.also_on(instances[0]);
      const auto w = lease.view<const float**>(toy.weight[u]);
      const auto b = lease.view<const float*>(toy.bias[u]);
      const auto dw = scope.view<float**>(toy.weight[u]);
      const auto db = scope.view<float*>(toy.bias[u]);

      Kokkos::parallel_for("test::weight", Kokkos::RangePolicy<Space>(instances[0], 0, 32),
                           AddRows<decltype(dw), decltype(w)>{dw, w});
      Kokkos::parallel_for("test::bias", Kokkos::RangePolicy<Space>(instances[1], 0, 17),
                           AddRows<decltype(db), decltype(b)>{db, b});
      scope.reduce();
    }
    (void)engine.step();
    // Rate 1: w -= w, then all are zero.
    EXPECT_EQ(values_of(engine, toy.weight[3])[9], 0);
    EXPECT_EQ(values_of(engine, toy.bias[2])[9], 0);
  }
  engine.quiet(instances[0]);
}

TEST(SubsetTest, EngineRunsOnSomeRanksWhileOthersDoNothing) {
  if (job_size() < 2) return;  // nobody to leave out
  MPI_Comm some = MPI_COMM_NULL;
  // All but rank 0, backwards: the engine's ranks are not the job's.
  MPI_Comm_split(MPI_COMM_WORLD, job_rank() == 0 ? MPI_UNDEFINED : 0, -job_rank(), &some);
  if (some == MPI_COMM_NULL) return;
  {
    const Toy toy;
    Engine engine(some, toy.model, toy_config());

    const StepResult result = toy_step(engine, toy, 1);

    EXPECT_EQ(engine.size(), job_size() - 1);
    EXPECT_EQ(engine.rank(), job_size() - 1 - job_rank());
    EXPECT_EQ(result.samples, job_size() - 1);
    EXPECT_EQ(values_of(engine, toy.bias[0])[0], toy.initial(toy.bias[0], 0) - 1);
  }
  MPI_Comm_free(&some);
}

TEST(SumTest, GivesAllRanksTheSameBits) {
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  std::vector<double> values{1.0 / (job_rank() + 3), 1e100 * job_rank(), -0.0, 1};

  engine.sum(values);

  double third = 0;
  for (int rank = 0; rank < job_size(); ++rank) third += 1.0 / (rank + 3);
  EXPECT_NEAR(values[0], third, 1e-15 * job_size());
  EXPECT_EQ(values[3], job_size());
  std::vector<double> of_first(values);
  MPI_Bcast(of_first.data(), 4, MPI_DOUBLE, 0, MPI_COMM_WORLD);
  EXPECT_EQ(values, of_first);
  EXPECT_NO_THROW(engine.sum({}));
}

TEST(CallersCommunicatorTest, KeepsItsErrorHandlerAndItsMessages) {
  const Toy toy;
  MPI_Comm callers = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &callers);
  MPI_Comm_set_errhandler(callers, MPI_ERRORS_ARE_FATAL);
  int mail = job_rank();
  int received = -1;
  MPI_Request request = MPI_REQUEST_NULL;
  // A message with any tag from anyone waits while the engine works on the same ranks.
  MPI_Irecv(&received, 1, MPI_INT, MPI_ANY_SOURCE, MPI_ANY_TAG, callers, &request);
  {
    Engine engine(callers, toy.model, toy_config());
    (void)toy_step(engine, toy, 1);

    MPI_Errhandler handler = MPI_ERRHANDLER_NULL;
    MPI_Comm_get_errhandler(callers, &handler);
    EXPECT_EQ(handler, MPI_ERRORS_ARE_FATAL);
  }
  MPI_Send(&mail, 1, MPI_INT, (job_rank() + 1) % job_size(), 5, callers);
  MPI_Wait(&request, MPI_STATUS_IGNORE);
  EXPECT_EQ(received, (job_rank() + job_size() - 1) % job_size());
  MPI_Comm_free(&callers);
}

// -- what is refused at the start
// ------------------------------------------------------------------

TEST(ConstructionTest, ConfigurationsThatDifferAreRefusedOnEveryRank) {
  if (job_size() == 1) return;  // nobody to differ from
  const Toy toy;
  const auto refused = [&](auto&& change) {
    Config config = toy_config();
    if (job_rank() == job_size() - 1) change(config);
    expect_error<ArgumentError>([&] { Engine engine(MPI_COMM_WORLD, toy.model, config); },
                                {"rank " + std::to_string(job_size() - 1)});
  };

  refused([](Config& c) { c.optimizer.learning_rate = std::nextafter(1.0, 2.0); });
  refused([](Config& c) { c.seed = 43; });
  refused([](Config& c) { c.slots = 3; });
  refused([](Config& c) { c.compute = DType::fp64; });
  refused([](Config& c) { c.preset = Preset::ddp; });
}

TEST(ConstructionTest, ModelsThatDifferAreRefusedOnEveryRank) {
  if (job_size() == 1) return;  // nobody to differ from
  Model model;
  const UnitId unit = model.unit("unit");
  (void)model.parameter(unit, "weight", {4, job_rank() == 1 ? 6 : 5});

  expect_error<ArgumentError>([&] { Engine engine(MPI_COMM_WORLD, model, toy_config()); },
                              {"rank 1"});
}

TEST(ConstructionTest, BadValueOnOneRankIsRefusedOnAll) {
  const Toy toy;
  Config config = toy_config();
  if (job_rank() == job_size() - 1) config.optimizer.learning_rate = std::nan("");

  EXPECT_THROW(Engine(MPI_COMM_WORLD, toy.model, config), Error);
}

TEST(ConstructionTest, ShardSizeThatDoesNotFitNamesThoseThatDo) {
  const Toy toy;
  Config config = toy_config();
  config.preset = Preset::mics;
  for (const int p : {job_size() + 1, 0, -1}) {
    config.shard_size = p;
    expect_error<Error>([&] { Engine engine(MPI_COMM_WORLD, toy.model, config); },
                        {std::to_string(p), "1"});
  }
}

TEST(ConstructionTest, TwoStagesThatAreImpossibleAreRefusedWithTheReason) {
  const Toy toy;
  Config config = toy_config();
  config.two_stage = Switch::on;
  config.ranks_per_node = job_size();

  EXPECT_THROW(Engine(MPI_COMM_WORLD, toy.model, config), ArgumentError);
}

TEST(ConstructionTest, EmptyModelTrains) {
  const Model model;
  Engine engine(MPI_COMM_WORLD, model, toy_config());

  engine.begin_micro_step({.samples = 3, .last = true});
  const StepResult result = engine.step().get();

  EXPECT_EQ(result.samples, 3 * job_size());
  EXPECT_EQ(result.gradient_norm, 0);
}

TEST(BudgetTest, IsRefusedWithTheSmallestShardSizeThatFits) {
  if (job_size() < 4) return;  // p = 1, 2 and 4
  Model model;
  for (int u = 0; u < 8; ++u) {
    (void)model.parameter(model.unit("unit" + std::to_string(u)), "weight", {1 << 20});
  }
  Config config = toy_config();
  config.preset = Preset::mics;
  const auto total_at = [&](int p) {
    config.shard_size = p;
    const Engine engine(MPI_COMM_WORLD, model, config);
    EXPECT_EQ(engine.arena_bytes(), engine.plan().memory().arena);
    return engine.plan().memory().total();
  };
  const auto at_1 = total_at(1);
  const auto at_2 = total_at(2);
  ASSERT_LT(at_2, at_1);

  config.shard_size = 1;
  config.memory_budget = at_2;
  expect_error<Error>([&] { Engine engine(MPI_COMM_WORLD, model, config); },
                      {std::to_string(at_1), std::to_string(at_2), "2"});
  config.shard_size = 2;
  EXPECT_NO_THROW(Engine(MPI_COMM_WORLD, model, config)) << "exactly the budget";
  config.memory_budget = at_2 - 1;
  expect_error<Error>([&] { Engine engine(MPI_COMM_WORLD, model, config); }, {"4"});
  config.memory_budget = 1000;
  EXPECT_THROW(Engine(MPI_COMM_WORLD, model, config), Error);
}

TEST(SizeTest, TenThousandTensorsOf1To1000ElementsTrain) {
  Model model;
  std::vector<UnitId> units;
  for (int u = 0; u < 100; ++u) {
    units.push_back(model.unit("unit" + std::to_string(u)));
    for (int i = 0; i < 100; ++i) {
      const std::int64_t count = 1 + (u * 100 + i) * 7919LL % 1000;
      (void)model.parameter(units.back(), "tensor" + std::to_string(i), {count},
                            {.init = Init::function([=](std::int64_t k) {
                               return coarse(static_cast<std::uint64_t>(u * 100 + i),
                                             static_cast<std::uint64_t>(k));
                             })});
    }
  }
  Engine engine(MPI_COMM_WORLD, model, toy_config());
  const auto expect_values = [&](double change) {
    std::int64_t differences = 0;
    engine.begin_evaluation();
    for (const UnitId unit : units) {
      const Lease lease = engine.gather(unit);
      for (const ParameterId id : model.parameters(unit)) {
        differences += count_differences(model, lease, id, engine.config(), [&](std::int64_t k) {
          return model.spec(id).options.init(0, id, k) + change * (id.value % 3);
        });
      }
    }
    EXPECT_EQ(differences, 0);
  };
  expect_values(0);

  engine.begin_micro_step({.samples = 1, .last = true});
  for (auto unit = units.rbegin(); unit != units.rend(); ++unit) {
    HostScope scope = engine.gradient(*unit);
    for (const ParameterId id : model.parameters(*unit)) {
      const auto d = scope.view<float*>(id);
      for (std::size_t k = 0; k < d.extent(0); ++k) d(k) += static_cast<float>(id.value % 3);
    }
    scope.reduce();
  }
  (void)engine.step();

  expect_values(-1);
}

}  // namespace
}  // namespace mics::test
