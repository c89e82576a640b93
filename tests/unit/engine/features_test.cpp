// SPDX-License-Identifier: Apache-2.0
// Complex parameters, an application's own optimizer, named states, the loss scale, schedules and
// the comparison of replicas.
#include "layouts.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/for_blocks.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

namespace mics::test {
namespace {

using Complex = std::complex<double>;

/// A unit of complex parameters of both widths and layouts beside a real one.
struct ComplexModel {
  Model model;
  UnitId unit;
  ParameterId single, left, wide, real;

  static Complex start(std::int64_t i) {
    return {coarse(1, static_cast<std::uint64_t>(i)), coarse(2, static_cast<std::uint64_t>(i))};
  }
  ComplexModel() {
    unit = model.unit("spectral");
    single = model.parameter(unit, "single", {7, 5},
                             {.init = Init::complex_function(start), .complex = true});
    left = model.parameter(
        unit, "left", {7, 5},
        {.init = Init::complex_function(start), .complex = true, .layout = MemoryLayout::left});
    wide = model.parameter(
        unit, "wide", {33},
        {.init = Init::complex_function(start), .dtype = DType::fp64, .complex = true});
    real = model.parameter(unit, "real", {19}, {.init = Init::ones()});
  }
};

template <class View>
void add_complex(const View& gradient, double value) {
  using Element = typename View::non_const_value_type;
  using Part = typename Element::value_type;
  for (std::size_t i = 0; i < gradient.span(); ++i) {
    gradient.data()[i] += Element(static_cast<Part>(value), static_cast<Part>(-value / 2));
  }
}

// Fails if the two parts are counted as one element, or a shard cuts through the wrong place.
TEST(ComplexParameters, AreGatheredReducedAndUpdatedAsPairs) {
  const ComplexModel complex;
  for (const Layout& layout : layouts_of_job()) {
    for (const DType compute : {DType::fp32, DType::bf16}) {
      SCOPED_TRACE(layout.text() + ", " + std::string(name(compute)));
      Config config = toy_config();
      layout.apply(config);
      config.compute = compute;
      config.optimizer.learning_rate = 0.5;
      Engine engine(MPI_COMM_WORLD, complex.model, config);
      for (int step = 0; step < 3; ++step) {
        engine.begin_micro_step({.samples = 1, .last = true});
        {
          const Lease lease = engine.gather(complex.unit);
          const auto single = host_view<const Kokkos::complex<float>**>(lease, complex.single);
          const auto left =
              host_view<const Kokkos::complex<float>**, Kokkos::LayoutLeft>(lease, complex.left);
          std::int64_t differences = 0;
          for (std::size_t i = 0; i < 7; ++i) {
            for (std::size_t j = 0; j < 5; ++j) {
              const Complex expected = ComplexModel::start(static_cast<std::int64_t>(i * 5 + j)) -
                                       Complex(0.5, -0.25) * static_cast<double>(step);
              for (const auto& value : {single(i, j), left(i, j)}) {
                differences += Complex(static_cast<double>(value.real()),
                                       static_cast<double>(value.imag())) == expected
                                   ? 0
                                   : 1;
              }
            }
          }
          EXPECT_EQ(differences, 0);
        }
        auto scope = engine.gradient(complex.unit);
        add_complex(host_gradient<Kokkos::complex<float>**>(scope, complex.single), 1);
        add_complex(
            host_gradient<Kokkos::complex<float>**, Kokkos::LayoutLeft>(scope, complex.left), 1);
        add_complex(host_gradient<Kokkos::complex<double>*>(scope, complex.wide), 1);
        scope.reduce();
        const StepResult result = engine.step().get();
        // Parts 1 and -1/2 of 103 complex elements, and zeros.
        EXPECT_NEAR(result.gradient_norm, std::sqrt(103 * 1.25), 1e-12);
      }
      std::vector<double> values(2 * 33);
      engine.read(complex.wide, values);
      for (std::int64_t i = 0; i < 33; ++i) {
        const Complex expected = ComplexModel::start(i) - Complex(1.5, -0.75);
        EXPECT_EQ(values[static_cast<std::size_t>(2 * i)], expected.real());
        EXPECT_EQ(values[static_cast<std::size_t>(2 * i + 1)], expected.imag());
      }
    }
  }
}

TEST(ComplexParameters, AreNotMistakenForRealOnes) {
  const ComplexModel complex;
  Engine engine(MPI_COMM_WORLD, complex.model, toy_config());
  engine.begin_evaluation();
  const Lease lease = engine.gather(complex.unit);

  expect_error<ArgumentError>([&] { (void)lease.view<const float**>(complex.single); },
                              {"complex fp32", "found fp32"});
  expect_error<ArgumentError>(
      [&] { (void)lease.view<const Kokkos::complex<float>*>(complex.real); },
      {"expected element type fp32", "complex fp32"});
  expect_error<ArgumentError>(
      [] {
        Model model;
        const UnitId unit = model.unit("u");
        (void)model.parameter(unit, "w", {3}, {.dtype = DType::bf16, .complex = true});
      },
      {"u/w", "fp32 or fp64", "bf16"});
}

/// The application's own rule: w -= rate * g / (1 + count), with a count of updates as its state.
/// On `faulty_rank`, from step `fault`, it also does what a broken memory would do to one weight.
struct CountingKernel {
  const float* gradient;
  float* weights;
  float* counts;
  std::int64_t count;
  std::int64_t faulty_step;  // -1: none
  const optim::DeviceStepInfo* info;

  KOKKOS_FUNCTION void operator()(std::int64_t i) const {
    if (info->update == 0) return;
    const auto g = static_cast<float>(static_cast<double>(gradient[i]) * info->gradient_scale);
    if (g != 0) {  // gaps stay as they are
      weights[i] -= static_cast<float>(info->learning_rate) * g / (1 + counts[i]);
      counts[i] += 1;
    }
    if (info->step == faulty_step && i == count / 2) weights[i] += 0.125F;
  }
};

class Counting final : public optim::Optimizer {
 public:
  explicit Counting(int faulty_rank = -1, std::int64_t fault = 0)
      : faulty_rank_(faulty_rank), fault_(fault) {}
  [[nodiscard]] std::string_view name() const override { return "counting"; }
  [[nodiscard]] std::vector<optim::StateSpec> states() const override { return {{"count"}}; }
  [[nodiscard]] std::string describe() const override { return "counting"; }
  void update(const optim::Slice& slice, const optim::StepInfo& info) const override {
    auto* const weights = static_cast<float*>(slice.master_weights);
    auto* const counts = static_cast<float*>(slice.states[0]);
    const auto* const gradient = static_cast<const float*>(slice.gradient);
    for (std::int64_t i = 0; i < slice.count; ++i) {
      const auto g = static_cast<float>(static_cast<double>(gradient[i]) * info.gradient_scale);
      if (g == 0) continue;  // gaps stay as they are
      weights[i] -= static_cast<float>(info.learning_rate) * g / (1 + counts[i]);
      counts[i] += 1;
    }
    if (job_rank() == faulty_rank_ && info.step == fault_ && slice.count > 0) {
      weights[slice.count / 2] += 0.125F;
    }
  }
  [[nodiscard]] bool runs_on_device() const override { return true; }
  void enqueue_update(const Execution& exec, const optim::Slice& slice,
                      const optim::DeviceStepInfo* info) const override {
    using Policy = Kokkos::RangePolicy<device::Space, Kokkos::IndexType<std::int64_t>>;
    Kokkos::parallel_for("counting", Policy(exec.as<device::Space>(), 0, slice.count),
                         CountingKernel{static_cast<const float*>(slice.gradient),
                                        static_cast<float*>(slice.master_weights),
                                        static_cast<float*>(slice.states[0]), slice.count,
                                        job_rank() == faulty_rank_ ? fault_ : -1, info});
  }

 private:
  int faulty_rank_;
  std::int64_t fault_;
};

// Fails if a name that no checkpoint can hold is found by the first save.
TEST(CustomOptimizer, NamesOfStatesAreThoseThatACheckpointHolds) {
  class Named final : public optim::Optimizer {
   public:
    explicit Named(std::vector<optim::StateSpec> states) : states_(std::move(states)) {}
    [[nodiscard]] std::string_view name() const override { return "named"; }
    [[nodiscard]] std::vector<optim::StateSpec> states() const override { return states_; }
    [[nodiscard]] std::string describe() const override { return "named"; }
    void update(const optim::Slice& /*slice*/, const optim::StepInfo& /*info*/) const override {}
    [[nodiscard]] bool runs_on_device() const override { return true; }

   private:
    std::vector<optim::StateSpec> states_;
  };
  const Toy toy;
  for (const std::vector<optim::StateSpec>& states :
       {std::vector<optim::StateSpec>{{"\xff"}}, {{"a"}, {"a"}}, {{""}}, {{"master_weights"}}}) {
    Config config = toy_config();
    config.custom_optimizer = std::make_shared<Named>(states);
    expect_error<ArgumentError>([&] { Engine(MPI_COMM_WORLD, toy.model, config); },
                                {"states of optimizer \"named\"", "names in UTF-8 that are new"});
  }
}

TEST(CustomOptimizer, KeepsItsStateByNameInEveryLayout) {
  const Toy toy;
  for (const Layout& layout : layouts_of_job()) {
    SCOPED_TRACE(layout.text());
    Config config = toy_config();
    layout.apply(config);
    config.custom_optimizer = std::make_shared<Counting>();
    Engine engine(MPI_COMM_WORLD, toy.model, config);

    for (int step = 0; step < 3; ++step) (void)toy_step(engine, toy, 1.0F);

    EXPECT_NE(engine.plan().text().find("counting"), std::string::npos);
    const auto weights = values_of(engine, toy.weight[0]);
    std::vector<double> counts(weights.size());
    engine.read(toy.weight[0], counts, "count");
    for (std::size_t i = 0; i < weights.size(); ++i) {
      const auto step = [](float w, float n) { return w - 1.0F / (1 + n); };
      const auto start =
          static_cast<float>(toy.initial(toy.weight[0], static_cast<std::int64_t>(i)));
      EXPECT_EQ(static_cast<float>(weights[i]), step(step(step(start, 0), 1), 2));
      EXPECT_EQ(counts[i], 3);
    }
    expect_error<ArgumentError>([&] { engine.read(toy.weight[0], counts, "exp_avg"); },
                                {"exp_avg", "count"});
  }
}

TEST(AverageOfWeights, FollowsThemAsANamedState) {
  const Toy toy;
  Config config = toy_config();
  config.optimizer.ema_decay = 0.75;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  const auto start = values_of(engine, toy.bias[1]);
  std::vector<double> average(start.size());
  engine.read(toy.bias[1], average, "ema");
  EXPECT_EQ(average, start);

  (void)toy_step(engine, toy, 1.0F);
  (void)toy_step(engine, toy, 1.0F);

  // 0.75 (0.75 w + 0.25 (w - 1)) + 0.25 (w - 2), exact in fp32.
  engine.read(toy.bias[1], average, "ema");
  for (std::size_t i = 0; i < start.size(); ++i) EXPECT_EQ(average[i], start[i] - 0.6875);
}

/// A gradient of `value` on all ranks, not finite on `bad_rank`.
StepResult step_with_overflow(Engine& engine, const Toy& toy, int bad_rank) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (std::size_t u = toy.units.size(); u-- > 0;) {
    const Lease lease = engine.gather(toy.units[u]);
    auto scope = engine.gradient(toy.units[u]);
    const auto scale = static_cast<float>(loss_scale(engine));
    add_constant(toy, scope, u, scale);
    if (job_rank() == bad_rank && u == 2) {
      host_gradient<float*>(scope, toy.bias[u])(3) = std::numeric_limits<float>::infinity();
    }
    scope.reduce();
  }
  return engine.step().get();
}

// Fails if the verdict stays within a shard group, or a skipped step counts.
TEST(LossScale, OverflowOnAnyOneRankSkipsTheStepOnAll) {
  const Toy toy;
  for (const Layout& layout : layouts_of_job()) {
    SCOPED_TRACE(layout.text());
    Config config = toy_config();
    layout.apply(config);
    config.loss_scale = {.dynamic = true, .initial = 1024, .window = 3, .hysteresis = 1};
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    double expected = 0;
    double scale = 1024;
    int good = 0;
    for (int step = 0; step < 2 * job_size() + 4; ++step) {
      const int bad = step % 2 == 0 && step / 2 < job_size() ? step / 2 : -1;
      const auto before = all_values(engine);
      EXPECT_EQ(loss_scale(engine), scale);

      const StepResult result = step_with_overflow(engine, toy, bad);

      EXPECT_EQ(result.overflow, bad >= 0);
      EXPECT_EQ(result.skipped, bad >= 0);
      EXPECT_EQ(result.loss_scale, scale);
      if (bad >= 0) {
        EXPECT_EQ(all_values(engine), before);
        scale /= 2;
        good = 0;
        scale = std::max(scale, 1.0);
      } else {
        expected += 1;
        ++good;
        EXPECT_NEAR(result.gradient_norm, std::sqrt(4 * (32 * 17 + 17.0)), 1e-9);
      }
      if (scale <= 2) break;  // the next would be an error
      if (bad < 0 && good == 4) scale *= 2;
      EXPECT_EQ(result.step, static_cast<std::int64_t>(expected));
    }
    const auto values = values_of(engine, toy.weight[3]);
    EXPECT_EQ(values[7], toy.initial(toy.weight[3], 7) - expected);
  }
}

TEST(LossScale, AtItsFloorIsAnErrorOnEveryRankAndTheEngineGoesOn) {
  const Toy toy;
  Config config = toy_config();
  config.loss_scale = {.dynamic = true, .initial = 2, .hysteresis = 1, .minimum = 1};
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  EXPECT_TRUE(step_with_overflow(engine, toy, 0).skipped);
  const auto before = all_values(engine);

  expect_error<StateError>([&] { (void)step_with_overflow(engine, toy, 0); }, {"loss scale"});

  EXPECT_EQ(all_values(engine), before);
  EXPECT_TRUE(engine.alive());
  EXPECT_FALSE(step_with_overflow(engine, toy, -1).skipped);
}

TEST(ScheduleOfConfig, SetsTheRateOfEachStepAndWaitsForSkippedOnes) {
  const Toy toy;
  Config config = toy_config();
  config.schedule = {.kind = ScheduleKind::warmup,
                     .warmup_min_lr = 0,
                     .warmup_max_lr = 1,
                     .warmup_num_steps = 4,
                     .warmup_type = WarmupShape::linear};
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  std::vector<double> rates;

  for (int step = 0; step < 6; ++step) {
    const StepResult result = step_with_overflow(engine, toy, step == 3 ? 0 : -1);
    rates.push_back(result.learning_rate);
  }

  EXPECT_EQ(rates, (std::vector<double>{0, 0, 0.25, 0.5, 0.5, 0.75}));
}

/// Lines that the library logs on this rank.
struct Lines {
  std::vector<std::string> warnings;
  LogSink sink() {
    return [this](LogLevel level, std::string_view line) {
      if (level == LogLevel::warning) warnings.emplace_back(line);
    };
  }
};

// Fails if frozen parameters, master weights or states are left out, or only one group is looked
// at.
TEST(ReplicaCheck, NamesTheReplicaTheUnitAndTheBlockThatDiffer) {
  const Toy toy;
  for (const Layout& layout : layouts_of_job()) {
    if (layout.shape.world == layout.shape.p) continue;  // one replica
    for (const int faulty : {0, layout.shape.world - 1}) {
      SCOPED_TRACE(layout.text() + ", rank " + std::to_string(faulty));
      Config config = toy_config();
      layout.apply(config);
      config.replica_check_every = 2;
      config.custom_optimizer = std::make_shared<Counting>(faulty, 2);
      Engine engine(MPI_COMM_WORLD, toy.model, config);
      (void)toy_step(engine, toy, 1.0F);

      expect_error<CommError>(
          [&] { (void)toy_step(engine, toy, 1.0F); },
          {"unit", "replica", "rank " + std::to_string(faulty), "bytes 0 to", "after step 2"});

      EXPECT_FALSE(engine.alive());
      MPI_Barrier(MPI_COMM_WORLD);
    }
  }
}

TEST(ReplicaCheck, RepairsFromTheMajorityAndGoesOn) {
  const Toy toy;
  for (const Layout& layout : layouts_of_job()) {
    const int replicas = layout.shape.world / layout.shape.p;
    if (replicas == 1) continue;
    SCOPED_TRACE(layout.text());
    // Of two replicas the lower one is believed, so the fault is on the other.
    const int faulty = layout.shape.world - 1;
    Config config = toy_config();
    layout.apply(config);
    config.replica_check_every = 1;
    config.replica_action = ReplicaCheck::repair;
    config.custom_optimizer = std::make_shared<Counting>(faulty, 2);
    Lines lines;
    Engine engine(MPI_COMM_WORLD, toy.model, config, {}, lines.sink());
    Config plain = config;
    plain.replica_check_every = 0;
    plain.custom_optimizer = std::make_shared<Counting>();
    Engine sound(MPI_COMM_WORLD, toy.model, plain);

    for (int step = 0; step < 4; ++step) {
      (void)toy_step(engine, toy, 1.0F);
      (void)toy_step(sound, toy, 1.0F);
      EXPECT_EQ(all_values(engine), all_values(sound)) << "step " << step;
    }

    EXPECT_EQ(lines.warnings.empty(), job_rank() != faulty);
    if (!lines.warnings.empty()) {
      EXPECT_NE(lines.warnings[0].find("repaired"), std::string::npos) << lines.warnings[0];
    }
  }
}

TEST(ReplicaCheck, OfEqualReplicasChangesNothing) {
  const Toy toy;
  Config config = toy_config();
  config.preset = Preset::ddp;
  config.replica_check_every = 1;
  config.optimizer = {.kind = OptimizerKind::adamw, .learning_rate = 0.1};
  Engine checked(MPI_COMM_WORLD, toy.model, config);
  config.replica_check_every = 0;
  Engine plain(MPI_COMM_WORLD, toy.model, config);

  for (int step = 0; step < 3; ++step) {
    (void)toy_step(checked, toy, 1.0F);
    (void)toy_step(plain, toy, 1.0F);
  }

  EXPECT_EQ(all_values(checked), all_values(plain));
}

// Fails if tags are numbers alone, or the watchdog's texts name only this rank's own operation.
TEST(DesyncOfTheEngine, NamesBothUnitsWithoutDebug) {
  if (job_size() == 1) return;  // nobody to differ from
  const Toy toy;
  Engine engine(MPI_COMM_WORLD, toy.model, toy_config());
  for (int step = 0; step < 3; ++step) (void)toy_step(engine, toy, 1.0F);
  const bool odd = job_rank() == job_size() - 1;

  // All follow the recorded order but the last, which reduces another unit first.
  const auto step = [&] {
    engine.begin_micro_step({.samples = 1, .last = true});
    for (const UnitId unit : toy.units) (void)engine.gather(unit);
    if (odd) {
      engine.gradient(toy.units[1]).reduce();
    }
    for (std::size_t u = toy.units.size(); u-- > 0;) backward_unit(engine, toy, u, 1.0F);
    (void)engine.step().get();
  };
  const bool nccl = engine.plan().request().transport == comm::TransportKind::nccl;
  if (nccl && odd) {
    // Collectives of NCCL have no name: its own second reduction is what stops this rank.
    expect_error<StateError>([&] { engine.guard(step); }, {"unit"});
  } else {
    expect_error<CommError>([&] { engine.guard(step); }, {"unit"});
  }
  MPI_Barrier(MPI_COMM_WORLD);
}

}  // namespace
}  // namespace mics::test
