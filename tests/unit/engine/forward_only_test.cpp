// SPDX-License-Identifier: Apache-2.0
// Engines that hold weights alone, filled from the checkpoints of engines that train.
#include "elements.hpp"
#include "layouts.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>
#include <mics/state/arena.hpp>
#include <support/shared_folder.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace mics::test {
namespace {

/// Units of a weight, a bias and a frozen table each; the last one has an fp64 parameter too.
struct Mixed {
  Model model;
  std::vector<UnitId> units;

  Mixed() {
    for (const char* name : {"a", "b", "c", "d"}) {
      const UnitId unit = units.emplace_back(model.unit(name));
      (void)model.parameter(unit, "weight", {31, 17}, {.init = Init::normal(0.5)});
      (void)model.parameter(unit, "bias", {17}, {.init = Init::normal(0.5)});
      (void)model.parameter(unit, "left", {7, 11},
                            {.init = Init::normal(1), .layout = MemoryLayout::left});
      (void)model.parameter(unit, "table", {65}, {.init = Init::normal(2), .trainable = false});
    }
    (void)model.parameter(units.back(), "wide", {301},
                          {.init = Init::normal(1), .dtype = DType::fp64});
  }
};

/// A step of AdamW that changes every trainable element by another amount.
void train(Engine& engine, const Mixed& mixed, const Config& config, int step) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (const UnitId unit : mixed.units) {
    const Lease lease = engine.gather(unit);
    auto scope = engine.gradient(unit);
    for (const ParameterId id : mixed.model.parameters(unit)) {
      if (!mixed.model.spec(id).options.trainable) continue;
      add_gradient(mixed.model, scope, id, config, [&](std::int64_t i) {
        return std::sin(static_cast<double>(i + 100 * id.value + 7 * step));
      });
    }
    scope.reduce();
  }
  (void)engine.step();
}

/// What leases show, widened.
std::vector<double> gathered(Engine& engine, const Mixed& mixed, const Config& config) {
  std::vector<double> all;
  engine.begin_evaluation();
  for (const UnitId unit : mixed.units) {
    const Lease lease = engine.gather(unit);
    for (const ParameterId id : mixed.model.parameters(unit)) {
      for_each_element(
          mixed.model, lease, id, dtype_of_parameter(mixed.model, id, config),
          [&](std::int64_t, const auto& element) { all.push_back(static_cast<double>(element)); });
    }
  }
  return all;
}

Config forward_config(const Config& training) {
  Config config = training;
  config.forward_only = true;
  config.seed = 99;  // other initial values
  return config;
}

// Fails if a weight is rounded otherwise than by the optimizer, or a buffer is laid out otherwise
// than the views say.
TEST(ForwardOnly, LeasesShowTheBitsThatTheTrainingEngineShows) {
  const Mixed mixed;
  const SharedFolder folder;
  int number = 0;
  for (const DType compute : {DType::bf16, DType::fp32, DType::fp16, DType::fp64}) {
    for (const Layout& layout : layouts_of_job()) {
      SCOPED_TRACE(layout.text() + ' ' + std::string(name(compute)));
      Config config;
      layout.apply(config);
      config.compute = compute;
      config.persistence_threshold = number % 2 == 0 ? 0 : 40;
      const std::string directory = folder.in(std::to_string(number++));
      Engine engine(MPI_COMM_WORLD, mixed.model, config);
      train(engine, mixed, config, 1);
      engine.save(directory);
      const auto expected = gathered(engine, mixed, config);

      const Config reader = forward_config(config);
      Engine forward(MPI_COMM_WORLD, mixed.model, reader);
      EXPECT_NE(gathered(forward, mixed, reader), expected);
      const auto loaded = forward.load(directory);

      ASSERT_TRUE(loaded.has_value());
      EXPECT_EQ(loaded->step, 1);
      EXPECT_EQ(gathered(forward, mixed, reader), expected);
    }
  }
}

TEST(ForwardOnly, LoadsFromOtherLayoutsAndDtypes) {
  const Mixed mixed;
  const SharedFolder folder;
  Config config;
  config.preset = Preset::zero3;
  apply_memory(config);
  Engine engine(MPI_COMM_WORLD, mixed.model, config);
  train(engine, mixed, config, 1);
  engine.save(folder.in("run"));
  for (const Layout& layout : layouts_of_job()) {
    Config reader;
    layout.apply(reader);
    reader.compute = DType::bf16;
    reader.forward_only = true;
    Engine forward(MPI_COMM_WORLD, mixed.model, reader);
    ASSERT_TRUE(forward.load(folder.in("run")).has_value());
    forward.begin_evaluation();
    for (const UnitId unit : mixed.units) {
      const Lease lease = forward.gather(unit);
      for (const ParameterId id : mixed.model.parameters(unit)) {
        std::vector<double> exact(static_cast<std::size_t>(mixed.model.spec(id).count));
        engine.read(id, exact);
        EXPECT_EQ(
            count_differences(mixed.model, lease, id, reader,
                              [&](std::int64_t i) { return exact[static_cast<std::size_t>(i)]; }),
            0)
            << mixed.model.spec(id).name << ", " << layout.text();
      }
    }
  }
}

// Fails if a slot, a prefetched gather or a resident buffer shows an older step.
TEST(ForwardOnly, ANewerStepReplacesTheWeightsBetweenPasses) {
  const Mixed mixed;
  const SharedFolder folder;
  for (const Layout& layout : layouts_of_job()) {
    for (const int slots : {1, 2, 4}) {
      SCOPED_TRACE(layout.text() + " slots=" + std::to_string(slots));
      const std::string directory = folder.in(layout.text() + std::to_string(slots));
      Config config;
      layout.apply(config);
      config.compute = DType::bf16;
      Engine engine(MPI_COMM_WORLD, mixed.model, config);
      Config reader = forward_config(config);
      reader.slots = slots;
      reader.persistence_threshold = 20;
      Engine forward(MPI_COMM_WORLD, mixed.model, reader);
      std::vector<std::vector<double>> shown;
      for (int step = 1; step <= 4; ++step) {
        train(engine, mixed, config, step);
        shown.push_back(gathered(engine, mixed, config));
        engine.save(directory);
        EXPECT_EQ(forward.load(directory)->step, step);
        // Twice: the second pass follows the first one's order and prefetches.
        EXPECT_EQ(gathered(forward, mixed, reader), shown.back());
        EXPECT_EQ(gathered(forward, mixed, reader), shown.back());
      }
      EXPECT_EQ(forward.load(directory, {.step = 2})->step, 2);
      EXPECT_EQ(gathered(forward, mixed, reader), shown[1]);
    }
  }
}

TEST(ForwardOnly, ThePlanAndTheArenaHoldWeightsAlone) {
  const Mixed mixed;
  for (const Layout& layout : layouts_of_job()) {
    Config config;
    layout.apply(config);
    config.compute = DType::bf16;
    const Config reader = forward_config(config);
    Engine forward(MPI_COMM_WORLD, mixed.model, reader);
    const MemoryPlan& memory = forward.plan().memory();

    std::int64_t shards = 0;
    std::int64_t largest = 0;
    for (const state::FlatBuffer& buffer : forward.plan().flat().buffers()) {
      shards += state::arena_bytes(buffer.flat.shard_count() * bytes_of(buffer.dtype));
      EXPECT_FALSE(buffer.trainable);
    }
    for (const UnitId unit : mixed.units) {
      largest = std::max(largest, forward.plan().flat().gathered_bytes(unit));
    }
    EXPECT_EQ(memory.compute_shards, shards);
    EXPECT_EQ(memory.master_weights + memory.optimizer_states + memory.accumulators, 0);
    EXPECT_EQ(memory.gradient_slots + memory.scratch + memory.staging, 0);
    if (layout.shape.p > 1 && layout.preset != Preset::zero2) {
      EXPECT_EQ(memory.gather_slots, 2 * largest);
      EXPECT_EQ(memory.resident, 0);
    }
    // On a device the loss and its scale, and their sums, have a place, whatever the engine is for.
    EXPECT_LT(memory.step, 1 << 17);
    EXPECT_LT(memory.conversions, 1 << 12);
    EXPECT_EQ(memory.total(), memory.compute_shards + memory.gather_slots + memory.resident +
                                  memory.step + memory.conversions);
    EXPECT_EQ(forward.arena_bytes(), memory.total());

    const std::string text = forward.plan().text();
    EXPECT_NE(text.find("forward only"), std::string::npos) << text;
    EXPECT_NE(text.find("no gradients, master weights or optimizer state"), std::string::npos);
    EXPECT_EQ(text.find("optimizer "), text.find("optimizer state")) << text;
    (void)gathered(forward, mixed, reader);  // records the order
    const auto before = forward.operations().count(comm::Purpose::gather);
    (void)gathered(forward, mixed, reader);
    // What still lies in a slot is not gathered again.
    EXPECT_LE(forward.operations().count(comm::Purpose::gather) - before,
              forward.plan().count(1).gather);
    EXPECT_NE(text.find("a pass            " + std::to_string(forward.plan().count(1).gather) +
                        " gathers"),
              std::string::npos)
        << text;
  }
}

TEST(ForwardOnly, TrainingIsRefusedAndGatheringGoesOn) {
  const Toy toy;
  const SharedFolder folder;
  Config config = toy_config();
  config.forward_only = true;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  const std::vector<std::string> why{"expected an engine with gradients and optimizer state",
                                     "forward only"};

  expect_error<StateError>([&] { engine.begin_micro_step({.samples = 1}); }, why);
  expect_error<StateError>([&] { (void)engine.gradient(toy.units[0]); }, why);
  expect_error<StateError>([&] { (void)engine.step(); }, why);
  expect_error<StateError>([&] { engine.save(folder.in("run")); }, why);
  EXPECT_EQ(engine.poll_save().phase, checkpoint::SavePhase::none);
  engine.begin_evaluation();
  {
    const Lease lease = engine.gather(toy.units[1]);
    expect_error<StateError>([&] { (void)engine.load(folder.in("run")); }, {"load", "\"b\""});
    EXPECT_EQ(host_view<const float*>(lease, toy.bias[1])(3), toy.initial(toy.bias[1], 3));
  }
  EXPECT_FALSE(engine.load(folder.in("run")).has_value());
  EXPECT_EQ(values_of(engine, toy.weight[2])[5], toy.initial(toy.weight[2], 5));
  EXPECT_TRUE(engine.alive());
}

TEST(ForwardOnly, IsAKeyOfTheConfiguration) {
  EXPECT_FALSE(Config().forward_only);
  EXPECT_TRUE(Config::parse(R"({"mics": {"forward_only": true}})", "deck").forward_only);
  expect_error<ConfigError>(
      [] { (void)Config::parse(R"({"mics": {"forward_only": "yes"}})", "deck"); },
      {"mics.forward_only"});
}

}  // namespace
}  // namespace mics::test
