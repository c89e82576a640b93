// SPDX-License-Identifier: Apache-2.0
// Units beyond 2^31 bytes and offsets beyond 2^31 elements, through the engine on two ranks: 13 GiB
// in all, of the device's memory where there is one.
#include "layouts.hpp"
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>

#include <cstdint>

namespace mics::test {
namespace {

// Integers that bf16 holds, different wherever offsets are wrong: the top bits of a product.
KOKKOS_FUNCTION float value(std::int64_t i) {
  return static_cast<float>((static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15ULL) >> 57);
}
// The mean over the two ranks.
KOKKOS_FUNCTION float gradient(std::int64_t i) { return value(i + 1'000'000'007); }

using Range = Kokkos::RangePolicy<Kokkos::DefaultExecutionSpace, Kokkos::IndexType<std::int64_t>>;

template <class T>
struct CountDifferences {
  const T* found;
  bool trained;
  KOKKOS_FUNCTION void operator()(std::int64_t i, std::int64_t& differences) const {
    const float expected = value(i) - (trained ? gradient(i) : 0.0F);
    if (static_cast<float>(found[i]) != expected) ++differences;
  }
};
template <class View>
std::int64_t count_differences(const View& view, bool trained) {
  using T = typename View::non_const_value_type;
  std::int64_t differences = 0;
  Kokkos::parallel_reduce("test::compare", Range(0, static_cast<std::int64_t>(view.extent(0))),
                          CountDifferences<T>{view.data(), trained}, differences);
  return differences;
}

struct WriteGradient {
  float* to;
  float own;
  KOKKOS_FUNCTION void operator()(std::int64_t i) const { to[i] = gradient(i) + own; }
};

Config large_config() {
  Config config;
  config.preset = Preset::zero3;
  config.slots = 1;
  config.prefetch = 0;
  config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 1};
  apply_memory(config);
  return config;
}

TEST(LargeUnitTest, OfMoreThanTwoToThe31ElementsIsGatheredWhole) {
  ASSERT_EQ(job_size(), 2);
  constexpr std::int64_t count = (std::int64_t{1} << 31) + 1'000'003;
  Model model;
  const UnitId unit = model.unit("unit");
  const ParameterId frozen =
      model.parameter(unit, "frozen", {count}, {.init = Init::function(value), .trainable = false});
  Config config = large_config();
  config.compute = DType::bf16;
  Engine engine(MPI_COMM_WORLD, model, config);

  engine.begin_evaluation();
  const Lease lease = engine.gather(unit);

  const auto view = lease.view<const bf16*>(frozen);
  ASSERT_EQ(static_cast<std::int64_t>(view.extent(0)), count);
  EXPECT_EQ(count_differences(view, false), 0);
}

TEST(LargeUnitTest, OfMoreThanTwoToThe31BytesIsTrained) {
  ASSERT_EQ(job_size(), 2);
  constexpr std::int64_t count = (std::int64_t{1} << 29) + 100'003;
  Model model;
  const UnitId unit = model.unit("unit");
  const ParameterId weight =
      model.parameter(unit, "weight", {count}, {.init = Init::function(value)});
  Engine engine(MPI_COMM_WORLD, model, large_config());

  engine.begin_micro_step({.samples = 1, .last = true});
  {
    (void)engine.gather(unit);
    auto scope = engine.gradient(unit, GradientMode::overwrite);
    const auto view = scope.view<float*>(weight);
    const float own = job_rank() == 0 ? -1.0F : 1.0F;
    Kokkos::parallel_for("test::gradient", Range(0, count), WriteGradient{view.data(), own});
    scope.reduce();
  }
  EXPECT_FALSE(engine.step().get().skipped);

  engine.begin_evaluation();
  const Lease lease = engine.gather(unit);
  const auto view = lease.view<const float*>(weight);
  EXPECT_EQ(count_differences(view, true), 0);
}

}  // namespace
}  // namespace mics::test
