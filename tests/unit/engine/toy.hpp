// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "layouts.hpp"
#include "small_net.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

namespace mics::test {

/// Units a, b, c, ... of a weight {32, 17} and a bias {17} each.
struct Toy {
  Model model;
  std::vector<UnitId> units;
  std::vector<ParameterId> weight, bias;

  explicit Toy(int count = 4) {
    for (int u = 0; u < count; ++u) {
      const auto stream = static_cast<std::uint64_t>(u);
      units.push_back(model.unit(std::string(1, static_cast<char>('a' + u))));
      weight.push_back(model.parameter(units.back(), "weight", {32, 17},
                                       {.init = Init::function([=](std::int64_t i) {
                                          return coarse(2 * stream, static_cast<std::uint64_t>(i));
                                        })}));
      bias.push_back(model.parameter(units.back(), "bias", {17},
                                     {.init = Init::function([=](std::int64_t i) {
                                        return coarse(2 * stream + 1,
                                                      static_cast<std::uint64_t>(i));
                                      })}));
    }
  }
  [[nodiscard]] double initial(ParameterId id, std::int64_t i) const {
    return model.spec(id).options.init(0, id, i);
  }
};

/// fp32, plain SGD of rate 1, sharded over all ranks.
[[nodiscard]] inline Config toy_config() {
  Config config;
  config.preset = Preset::zero3;
  config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 1};
  config.timeout = 20;
  apply_memory(config);
  return config;
}

/// Adds `value` to every gradient of a unit.
inline void add_constant(const Toy& toy, const GradientScope& scope, std::size_t unit,
                         float value) {
  const auto dw = host_gradient<float**>(scope, toy.weight[unit]);
  const auto db = host_gradient<float*>(scope, toy.bias[unit]);
  for (std::size_t i = 0; i < dw.extent(0); ++i) {
    for (std::size_t j = 0; j < dw.extent(1); ++j) dw(i, j) += value;
  }
  for (std::size_t i = 0; i < db.extent(0); ++i) db(i) += value;
}

/// Gathers a unit and adds to its gradient; one reduction.
inline void backward_unit(Engine& engine, const Toy& toy, std::size_t unit, float value) {
  const Lease lease = engine.gather(toy.units[unit]);
  auto scope = engine.gradient(toy.units[unit]);
  add_constant(toy, scope, unit, value);
  scope.reduce();
}

/// One step of one micro-step in which every rank adds `value` to every gradient for one sample,
/// so that the mean gradient is `value`.
inline StepResult toy_step(Engine& engine, const Toy& toy, float value) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (const UnitId unit : toy.units) (void)engine.gather(unit);
  for (std::size_t u = toy.units.size(); u-- > 0;) backward_unit(engine, toy, u, value);
  return engine.step().get();
}

[[nodiscard]] inline std::vector<double> values_of(Engine& engine, ParameterId id,
                                                   bool master = true) {
  std::vector<double> values(static_cast<std::size_t>(engine.model().spec(id).count));
  engine.read(id, values, master ? "master_weights" : "compute");
  return values;
}

/// All parameters of an engine, one after another.
[[nodiscard]] inline std::vector<double> all_values(Engine& engine) {
  std::vector<double> all;
  for (int i = 0; i < engine.model().parameters(); ++i) {
    const auto values = values_of(engine, {i});
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

/// Expects an exception of the class whose text holds all of `parts`.
template <class Exception, class Action>
void expect_error(Action&& action, const std::vector<std::string>& parts) {
  try {
    action();
    ADD_FAILURE() << "no error";
  } catch (const Exception& error) {
    const std::string text = error.what();
    for (const auto& part : parts) {
      EXPECT_NE(text.find(part), std::string::npos) << "no \"" << part << "\" in: " << text;
    }
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another class: " << error.what();
  }
}

}  // namespace mics::test
