// SPDX-License-Identifier: Apache-2.0
// Engines load what engines of earlier releases saved: unit/checkpoint/golden/version<n>. Files of
// the present version come from MICS_WRITE_GOLDEN=<folder>, on 3 ranks.
#include "layouts.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace mics::test {
namespace {

const std::filesystem::path golden = std::filesystem::path(MICS_GOLDEN) / "version1";

struct Case {
  const char* name;
  DType compute;
  OptimizerConfig optimizer;
  std::vector<std::string> states;
};

const std::vector<Case>& cases() {
  static const std::vector<Case> all{
      {"adamw_ema",
       DType::bf16,
       {.kind = OptimizerKind::adamw, .learning_rate = 0.01, .ema_decay = 0.9},
       {"exp_avg", "exp_avg_sq", "ema"}},
      {"sgd",
       DType::fp32,
       {.kind = OptimizerKind::sgd, .learning_rate = 0.25, .momentum = 0.5},
       {"momentum_buffer"}},
      {"adagrad", DType::fp16, {.kind = OptimizerKind::adagrad, .learning_rate = 0.01}, {"sum"}},
  };
  return all;
}

struct SmallModel {
  Model model;
  std::vector<UnitId> units;

  SmallModel() {
    for (const char* name : {"a", "b"}) {
      const UnitId unit = units.emplace_back(model.unit(name));
      (void)model.parameter(unit, "weight", {17, 13}, {.init = Init::normal(0.5)});
      (void)model.parameter(unit, "left", {5, 7},
                            {.init = Init::normal(1), .layout = MemoryLayout::left});
      (void)model.parameter(unit, "table", {65}, {.init = Init::normal(1), .trainable = false});
    }
    (void)model.parameter(units.back(), "wide", {31},
                          {.init = Init::normal(1), .dtype = DType::fp64});
    (void)model.parameter(units.back(), "spectrum", {9},
                          {.init = Init::normal(1), .complex = true});
  }
};

Config config_of(const Case& of) {
  Config config;
  config.preset = Preset::zero3;
  config.compute = of.compute;
  config.optimizer = of.optimizer;
  config.loss_scale = {.dynamic = of.compute == DType::fp16, .initial = 1024, .window = 2};
  apply_memory(config);
  return config;
}

std::vector<double> whole_state(Engine& engine, const Case& of) {
  std::vector<double> all;
  for (int i = 0; i < engine.model().parameters(); ++i) {
    const ParameterSpec& spec = engine.model().spec({i});
    std::vector<double> values(static_cast<std::size_t>(spec.scalars()));
    engine.read({i}, values);
    all.insert(all.end(), values.begin(), values.end());
    if (!spec.options.trainable) continue;
    for (const std::string& state : of.states) {
      engine.read({i}, values, state);
      all.insert(all.end(), values.begin(), values.end());
    }
  }
  return all;
}

void step(Engine& engine, const SmallModel& small, int number) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (const UnitId unit : small.units) {
    HostScope scope = engine.gradient(unit);
    const ParameterId weight = small.model.parameters(unit).front();
    visit(engine.config().compute, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto dw = scope.template view<T**>(weight);
      for (std::size_t i = 0; i < dw.extent(0); ++i) {
        dw(i, i % dw.extent(1)) = static_cast<T>(static_cast<float>(number) * loss_scale(engine));
      }
    });
    scope.reduce();
  }
  (void)engine.step();
}

TEST(GoldenEngine, LoadsWhatVersion1Saved) {
  const SmallModel small;
  for (const Case& of : cases()) {
    SCOPED_TRACE(of.name);
    if (const char* const folder = std::getenv("MICS_WRITE_GOLDEN")) {
      ASSERT_EQ(job_size(), 3);
      Engine engine(MPI_COMM_WORLD, small.model, config_of(of));
      for (int number = 1; number <= 4; ++number) step(engine, small, number);
      const std::filesystem::path to = std::filesystem::path(folder) / of.name;
      engine.save(to.string(), {.blobs = {{"note", {std::byte{7}}}}});
      const std::vector<double> state = whole_state(engine, of);
      if (job_rank() == 0) {
        std::ofstream(to / "state.bin", std::ios::binary)
            .write(reinterpret_cast<const char*>(state.data()),
                   static_cast<std::streamsize>(state.size() * sizeof(double)));
      }
      continue;
    }
    std::ifstream file(golden / of.name / "state.bin", std::ios::binary);
    const std::string bits(std::istreambuf_iterator<char>(file), {});
    std::vector<double> expected(bits.size() / sizeof(double));
    std::memcpy(expected.data(), bits.data(), bits.size());
    ASSERT_GT(expected.size(), 1000U);
    for (const Layout& layout : layouts_of_job()) {
      Config config = config_of(of);
      layout.apply(config);
      config.seed = 99;  // other initial values
      Engine engine(MPI_COMM_WORLD, small.model, config);

      const auto loaded = engine.load((golden / of.name).string());

      ASSERT_TRUE(loaded.has_value());
      EXPECT_EQ(loaded->step, 4);
      EXPECT_EQ(loaded->blobs, (Blobs{{"note", {std::byte{7}}}}));
      EXPECT_EQ(whole_state(engine, of), expected) << layout.text();
      // The third good step ended a window of two.
      EXPECT_EQ(loss_scale(engine), of.compute == DType::fp16 ? 2048 : 1024);
      step(engine, small, 5);
      EXPECT_NE(whole_state(engine, of), expected);
    }
  }
}

}  // namespace
}  // namespace mics::test
