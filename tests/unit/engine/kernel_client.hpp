// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "host_access.hpp"
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace mics::test {

/// gradient(i) += loss scale * (weight(i) + 1) / 64
template <class Gradient, class Weight, class Scale>
struct AddGradient {
  Gradient gradient;
  Weight weight;
  Scale scale;
  KOKKOS_FUNCTION void operator()(int i) const {
    using G = typename Gradient::non_const_value_type;
    const double sum =
        static_cast<double>(gradient(i)) + scale() * (static_cast<double>(weight(i)) + 1) / 64;
    gradient(i) = static_cast<G>(static_cast<float>(sum));
  }
};

template <class Loss>
struct AddLoss {
  Loss loss;
  KOKKOS_FUNCTION void operator()(int) const { loss() += 1; }
};

/// An application all of whose work is kernels of the default execution space, as on a device: it
/// never waits. The state is in that space's memory.
struct KernelClient {
  static constexpr int units = 4;

  Model model;
  std::vector<UnitId> unit;
  std::vector<ParameterId> weight, bias;

  explicit KernelClient(std::int64_t count = 4099) {
    const auto init =
        Init::function([](std::int64_t i) { return static_cast<double>(i % 64) / 64; });
    for (int u = 0; u < units; ++u) {
      unit.push_back(model.unit("unit" + std::to_string(u)));
      weight.push_back(model.parameter(unit.back(), "weight", {count + 70 * u}, {.init = init}));
      bias.push_back(model.parameter(unit.back(), "bias", {17}, {.init = init}));
    }
  }

  /// One step of `micro_steps` of a sample a rank each; its result is not waited for.
  StepHandle step(Engine& engine, int micro_steps = 1) const {
    for (int m = 0; m < micro_steps; ++m) {
      engine.begin_micro_step({.samples = 1, .last = m + 1 == micro_steps});
      for (const UnitId id : unit) (void)engine.gather(id);
      const auto loss = engine.loss();
      launch("loss", 1, AddLoss<decltype(loss)>{loss});
      for (int u = units; u-- > 0;) {
        const auto at = static_cast<std::size_t>(u);
        const Lease lease = engine.gather(unit[at]);
        auto scope = engine.gradient(unit[at]);
        for (const ParameterId id : {weight[at], bias[at]}) add(engine, lease, scope, id);
        scope.reduce();
      }
    }
    return engine.step();
  }

 private:
  template <class Kernel>
  static void launch(const char* label, std::int64_t count, const Kernel& kernel) {
    using Space = Kokkos::DefaultExecutionSpace;
    Kokkos::parallel_for(label, Kokkos::RangePolicy<Space>(Space(), 0, static_cast<int>(count)),
                         kernel);
  }
  void add(const Engine& engine, const Lease& lease, const GradientScope& scope,
           ParameterId id) const {
    const auto scale = engine.loss_scale();
    visit(engine.config().compute, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto w = lease.template view<const T*>(id);
      const auto g = scope.template view<T*>(id);
      launch("gradient", model.spec(id).count,
             AddGradient<decltype(g), decltype(w), decltype(scale)>{g, w, scale});
    });
  }
};

}  // namespace mics::test
