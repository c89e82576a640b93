// SPDX-License-Identifier: Apache-2.0
// 10,000 tensors of 1 to 1000 elements: one collective a unit, and every element in its place.
#include "elements.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace mics::test {
namespace {

constexpr int units = 40;
constexpr int tensors_of_a_unit = 250;

// Small integers: exact in every dtype.
double initial(int parameter, std::int64_t i) {
  return static_cast<double>((parameter * 31 + i * 7) % 61 - 30);
}
double mean_gradient(int parameter, std::int64_t i) {
  return static_cast<double>((parameter + i) % 5 - 2);
}

Model many_tensors() {
  Model model;
  for (int u = 0; u < units; ++u) {
    const UnitId unit = model.unit("unit" + std::to_string(u));
    for (int t = 0; t < tensors_of_a_unit; ++t) {
      const int p = u * tensors_of_a_unit + t;
      const std::int64_t count = 1 + p * std::int64_t{7919} % 1000;
      (void)model.parameter(
          unit, "tensor" + std::to_string(t), {count},
          {.init = Init::function([p](std::int64_t i) { return initial(p, i); })});
    }
  }
  return model;
}

void train_a_step(Engine& engine, const Model& model) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (int u = 0; u < units; ++u) (void)engine.gather({u});
  for (int u = units; u-- > 0;) {
    const Lease lease = engine.gather({u});
    auto scope = engine.gradient({u});
    for (const ParameterId id : model.parameters({u})) {
      add_gradient(model, scope, id, engine.config(),
                   [&](std::int64_t i) { return mean_gradient(id.value, i); });
    }
    scope.reduce();
  }
  EXPECT_FALSE(engine.step().get().skipped);
}

TEST(ManyTensorsTest, TrainExactlyWithOneCollectiveAUnit) {
  const Model model = many_tensors();
  ASSERT_EQ(model.parameters(), 10'000);
  for (const DType compute : {DType::fp32, DType::bf16}) {
    for (const std::int64_t persistent : {0, 50}) {
      SCOPED_TRACE(std::string(name(compute)) + ", persistent up to " + std::to_string(persistent));
      Config config = toy_config();
      config.compute = compute;
      config.persistence_threshold = persistent;
      Engine engine(MPI_COMM_WORLD, model, config);
      train_a_step(engine, model);

      const auto gathers = engine.operations().count(comm::Purpose::gather);
      const auto reductions = engine.operations().count(comm::Purpose::hop1);
      train_a_step(engine, model);

      const CollectiveCounts planned = engine.plan().count(1);
      EXPECT_EQ(engine.operations().count(comm::Purpose::gather) - gathers, planned.gather);
      EXPECT_EQ(engine.operations().count(comm::Purpose::hop1) - reductions, planned.hop1);
      EXPECT_LE(planned.gather, 2 * units + 1);
      EXPECT_LE(planned.hop1, units + 1);
      engine.begin_evaluation();
      for (int u = 0; u < units; ++u) {
        const Lease lease = engine.gather({u});
        for (const ParameterId id : model.parameters({u})) {
          ASSERT_EQ(count_differences(model, lease, id, engine.config(),
                                      [&](std::int64_t i) {
                                        return initial(id.value, i) -
                                               2 * mean_gradient(id.value, i);
                                      }),
                    0)
              << model.spec(id).name;
        }
      }
    }
  }
}

}  // namespace
}  // namespace mics::test
