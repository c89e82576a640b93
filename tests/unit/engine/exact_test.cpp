// SPDX-License-Identifier: Apache-2.0
// Training in which every sum is exact: gradients are small integers times a power of two, rates
// are powers of two, and so is the number of samples. All layouts and dtypes must then give the
// same bits, and the expected values need no arithmetic of the library.
#include "elements.hpp"
#include "layouts.hpp"
#include "small_net.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace mics::test {
namespace {

constexpr int steps = 6;
constexpr Batches batches{.batch = 16};

/// Six units whose buffers are cut at odd places; two dtypes in one unit, one unit without a
/// trainable parameter and one with nothing but a scalar.
struct OddModel {
  Model model;
  std::vector<UnitId> units;

  OddModel() {
    const auto init = [this] {
      const auto stream = static_cast<std::uint64_t>(model.parameters());
      return Init::function(
          [=](std::int64_t i) { return coarse(stream, static_cast<std::uint64_t>(i)); });
    };
    const auto unit = [&](const char* name) { return units.emplace_back(model.unit(name)); };
    const UnitId first = unit("first");
    (void)model.parameter(first, "weight", {37, 29}, {.init = init()});
    (void)model.parameter(first, "bias", {37}, {.init = init()});
    const UnitId mixed = unit("mixed");
    (void)model.parameter(mixed, "weight", {23, 31},
                          {.init = init(), .layout = MemoryLayout::left});
    (void)model.parameter(mixed, "precise", {301}, {.init = init(), .dtype = DType::fp64});
    (void)model.parameter(mixed, "frozen", {257}, {.init = init(), .trainable = false});
    const UnitId table = unit("table");
    (void)model.parameter(table, "nothing", {5, 0}, {});
    (void)model.parameter(table, "values", {2049}, {.init = init(), .learning_rate_factor = 0.5});
    const UnitId constant = unit("constant");
    (void)model.parameter(constant, "values", {65}, {.init = init(), .trainable = false});
    const UnitId scalar = unit("scalar");
    (void)model.parameter(scalar, "value", {}, {.init = init()});
    const UnitId last = unit("last");
    (void)model.parameter(last, "weight", {1, 511}, {.init = init()});
    (void)model.parameter(last, "one", {1}, {.init = init()});
  }
};

double exact_gradient(std::int64_t sample, int parameter, std::int64_t i) {
  const auto bits = scramble(static_cast<std::uint64_t>(sample) * 1009 +
                             static_cast<std::uint64_t>(parameter) * 100003 +
                             static_cast<std::uint64_t>(i) * 7919);
  return (static_cast<double>(bits % 7) - 3) / 8;
}

double rate(int step) { return std::ldexp(1.0, -3 - step % 3); }

/// Weights after every step, computed by whole arrays.
class ExactReference {
 public:
  explicit ExactReference(const Model& model) {
    for (int i = 0; i < model.parameters(); ++i) {
      const ParameterSpec& spec = model.spec({i});
      auto& w = weights_.emplace_back();
      for (std::int64_t k = 0; k < spec.count; ++k) w.push_back(spec.options.init(0, {i}, k));
    }
    after_.push_back(weights_);
    for (int step = 0; step < steps; ++step) {
      for (int i = 0; i < model.parameters(); ++i) {
        const ParameterOptions& options = model.spec({i}).options;
        if (!options.trainable) continue;
        auto& w = weights_[static_cast<std::size_t>(i)];
        for (std::size_t k = 0; k < w.size(); ++k) {
          double sum = 0;
          for (const auto sample : batches.all(step)) {
            sum += exact_gradient(sample, i, static_cast<std::int64_t>(k));
          }
          w[k] -=
              rate(step) * options.learning_rate_factor * sum / static_cast<double>(batches.batch);
        }
      }
      after_.push_back(weights_);
    }
  }
  /// Before step `step`.
  [[nodiscard]] const std::vector<double>& weights(int step, ParameterId id) const {
    return after_[static_cast<std::size_t>(step)][static_cast<std::size_t>(id.value)];
  }

 private:
  std::vector<std::vector<double>> weights_;
  std::vector<std::vector<std::vector<double>>> after_;
};

struct Counts {
  std::int64_t gather, hop1, hop2, norm;
  explicit Counts(const Engine& engine)
      : gather(engine.operations().count(comm::Purpose::gather)),
        hop1(engine.operations().count(comm::Purpose::hop1)),
        hop2(engine.operations().count(comm::Purpose::hop2)),
        norm(engine.operations().count(comm::Purpose::norm)) {}
  [[nodiscard]] CollectiveCounts since(const Counts& before) const {
    return {gather - before.gather, hop1 - before.hop1, hop2 - before.hop2, norm - before.norm};
  }
};

std::string text(const CollectiveCounts& c) {
  return std::to_string(c.gather) + " gathers, " + std::to_string(c.hop1) + " hop 1, " +
         std::to_string(c.hop2) + " hop 2, " + std::to_string(c.norm) + " norm";
}

class ExactRun {
 public:
  ExactRun(const OddModel& odd, const ExactReference& reference, const Config& config)
      : odd_(odd),
        reference_(reference),
        config_(config),
        engine_(MPI_COMM_WORLD, odd.model, config) {
    std::vector<double> rates;
    for (int step = 0; step < steps; ++step) rates.push_back(rate(step));
    engine_.set_learning_rates(rates);
  }

  void expect_exact_steps(int micro_steps) {
    std::vector<UnitId> order(odd_.units);
    order.insert(order.end(), odd_.units.rbegin(), odd_.units.rend());
    const CollectiveCounts planned = engine_.plan().count(order, micro_steps);
    for (int step = 0; step < steps; ++step) {
      const Counts before(engine_);
      for (int m = 0; m < micro_steps; ++m) micro_step(step, m, micro_steps);
      const StepResult result = engine_.step().get();
      const CollectiveCounts made = Counts(engine_).since(before);

      EXPECT_EQ(result.samples, batches.batch);
      EXPECT_TRUE(result.untouched.empty());
      EXPECT_EQ(result.learning_rate, rate(step));
      if (step > 0) {
        EXPECT_EQ(made, planned) << "step " << step << " made " << text(made) << ", planned "
                                 << text(planned);
      }
      const auto buffers = static_cast<std::int64_t>(engine_.plan().flat().buffer_count());
      EXPECT_LE(made.gather, buffers * (2 * micro_steps + 1));
      EXPECT_LE(made.hop1, buffers * micro_steps);
      EXPECT_LE(made.hop2, buffers);
    }
    EXPECT_EQ(engine_.plan().count(micro_steps), planned);
    for (int i = 0; i < odd_.model.parameters(); ++i) {
      std::vector<double> values(static_cast<std::size_t>(odd_.model.spec({i}).count));
      engine_.read({i}, values);
      EXPECT_EQ(values, reference_.weights(steps, {i})) << odd_.model.spec({i}).name;
    }
  }

 private:
  void micro_step(int step, int m, int micro_steps) {
    const auto samples = batches.part(step, m, micro_steps, engine_.rank(), engine_.size());
    engine_.begin_micro_step({.samples = std::ssize(samples), .last = m == micro_steps - 1});
    for (const UnitId unit : odd_.units) expect_weights(step, unit);
    for (auto unit = odd_.units.rbegin(); unit != odd_.units.rend(); ++unit) {
      const Lease lease = expect_weights(step, *unit);
      const bool overwrite = (step + m) % 2 == 1;
      auto scope = engine_.gradient(*unit, overwrite ? GradientMode::overwrite : GradientMode::add);
      for (const ParameterId id : odd_.model.parameters(*unit)) {
        if (!odd_.model.spec(id).options.trainable) continue;
        if (overwrite) {
          set_gradient(odd_.model, scope, id, config_, [](std::int64_t) { return 0.0; });
        }
        for (const auto sample : samples) {
          add_gradient(odd_.model, scope, id, config_,
                       [&](std::int64_t i) { return exact_gradient(sample, id.value, i); });
        }
      }
      scope.reduce();
    }
  }

  Lease expect_weights(int step, UnitId unit) {
    Lease lease = engine_.gather(unit);
    for (const ParameterId id : odd_.model.parameters(unit)) {
      const auto& expected = reference_.weights(step, id);
      EXPECT_EQ(
          count_differences(odd_.model, lease, id, config_,
                            [&](std::int64_t i) { return expected[static_cast<std::size_t>(i)]; }),
          0)
          << odd_.model.spec(id).name << " before step " << step;
    }
    return lease;
  }

  const OddModel& odd_;
  const ExactReference& reference_;
  Config config_;
  Engine engine_;
};

/// Slots, prefetch and persistence change what travels when, never a bit.
struct Variant {
  int slots;
  std::optional<int> prefetch;
  std::int64_t persistence;
  bool debug;
};
constexpr std::array variants{Variant{2, {}, 0, false}, Variant{3, {}, 0, false},
                              Variant{1, {}, 0, false}, Variant{2, 0, 300, false},
                              Variant{3, 1, 70, false}, Variant{2, {}, 1'000'000, false},
                              Variant{2, {}, 0, true}};

void expect_exact(DType compute, const Layout& layout, int micro_steps, const Variant& variant) {
  static const OddModel odd;
  static const ExactReference reference(odd.model);
  if (!in_sample()) return;
  SCOPED_TRACE(layout.text() + " " + std::string(name(compute)) + " micro-steps=" +
               std::to_string(micro_steps) + " slots=" + std::to_string(variant.slots) +
               " prefetch=" + std::to_string(variant.prefetch.value_or(-1)) + " persistence=" +
               std::to_string(variant.persistence) + (variant.debug ? " debug" : ""));
  Config config;
  layout.apply(config);
  config.compute = compute;
  config.optimizer.kind = OptimizerKind::sgd;
  config.slots = variant.slots;
  config.prefetch = variant.prefetch;
  config.persistence_threshold = variant.persistence;
  config.debug = variant.debug;

  ExactRun run(odd, reference, config);
  run.expect_exact_steps(micro_steps);
}

class Exact : public testing::TestWithParam<DType> {};

TEST_P(Exact, EveryLayoutAndDivisionGivesTheSameBitsAndThePlannedCollectives) {
  const auto layouts = layouts_of_job();
  ASSERT_FALSE(layouts.empty()) << "no layout is listed for " << job_size() << " ranks";

  for (const Layout& layout : layouts) {
    for (const int micro_steps : {1, 2, 5}) {
      expect_exact(GetParam(), layout, micro_steps, variants[0]);
    }
  }
}

TEST_P(Exact, SlotsPrefetchPersistenceAndDebugChangeNoBit) {
  // Two layouts are enough: the first where everything is gathered over all ranks, and the last.
  const auto layouts = layouts_of_job();
  ASSERT_FALSE(layouts.empty());
  const auto whole = std::ranges::find_if(layouts, [](const Layout& layout) {
    return layout.preset == Preset::zero3 || layout.shape.world == 1;
  });
  ASSERT_NE(whole, layouts.end());

  for (const Variant& variant : variants) {
    for (const Layout& layout : {*whole, layouts.front()}) {
      expect_exact(GetParam(), layout, 2, variant);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(OfDtype, Exact,
                         testing::Values(DType::fp64, DType::fp32, DType::bf16, DType::fp16),
                         [](const auto& of) { return std::string(name(of.param)); });

/// Dtypes of gradients, of the network and of the accumulator, each left to its default or chosen.
struct DTypes {
  DType compute;
  std::optional<DType> gradient, wire, accumulate;

  [[nodiscard]] std::string text() const {
    const auto word = [](std::optional<DType> d) { return d ? std::string(name(*d)) : "default"; };
    return "compute " + std::string(name(compute)) + ", gradient " + word(gradient) + ", wire " +
           word(wire) + ", accumulate " + word(accumulate);
  }
};
std::vector<DTypes> all_dtypes() {
  using Choice = std::optional<DType>;
  const std::array<Choice, 4> choices{Choice{}, DType::fp32, DType::bf16, DType::fp16};
  std::vector<DTypes> all;
  for (const DType compute : {DType::fp32, DType::bf16, DType::fp16, DType::fp64}) {
    for (const Choice gradient : choices) {
      for (const Choice wire : choices) {
        for (const Choice accumulate : choices) {
          if (compute == DType::fp64 && (gradient || accumulate)) continue;
          all.push_back({compute, gradient, wire, accumulate});
        }
      }
    }
  }
  return all;
}

// Sums of these gradients have 6 bits, so that no dtype rounds them, and the factors that keep
// 16-bit sums from overflowing are powers of two. Fails if a factor is not divided out again, or a
// shard is cut by the wrong element size.
TEST(ExactDTypes, EveryCombinationGivesTheSameBits) {
  static const OddModel odd;
  static const ExactReference reference(odd.model);
  const auto layouts = layouts_of_job();
  const std::vector<DTypes> combinations = all_dtypes();
  // Many ranks on few cores are slow: each of them takes its share of the combinations.
  const std::size_t stride = job_size() <= 2 ? 1 : 7;
  for (std::size_t i = static_cast<std::size_t>(job_size()) % stride; i < combinations.size();
       i += stride) {
    if (!in_sample()) continue;
    const DTypes& dtypes = combinations[i];
    const Layout& layout = layouts[i % layouts.size()];
    SCOPED_TRACE(dtypes.text() + ", " + layout.text());
    Config config;
    layout.apply(config);
    config.compute = dtypes.compute;
    config.gradient = dtypes.gradient;
    config.wire = dtypes.wire;
    config.accumulate = dtypes.accumulate;
    config.accumulation_steps = 2;
    config.optimizer.kind = OptimizerKind::sgd;
    config.persistence_threshold = i % 3 == 0 ? 100 : 0;
    if (i % 5 == 1) config.master = DType::fp64;
    if (i % 4 == 1) config.gradient_predivide_factor = 4;
    const bool ranks_are_power_of_two = (job_size() & (job_size() - 1)) == 0;
    if (i % 4 == 2 && ranks_are_power_of_two) config.prescale_gradients = true;

    ExactRun run(odd, reference, config);
    run.expect_exact_steps(2);
  }
}

TEST(Gather, GivesTheBitsOfInitOnEveryRankAndInEveryLayout) {
  Model model;
  const UnitId a = model.unit("a");
  (void)model.parameter(a, "normal", {41, 53}, {.init = Init::normal(0.02)});
  (void)model.parameter(a, "left", {17, 19},
                        {.init = Init::uniform(-1, 3), .layout = MemoryLayout::left});
  const UnitId b = model.unit("b");
  (void)model.parameter(b, "half", {1025}, {.init = Init::normal(1), .dtype = DType::bf16});
  (void)model.parameter(b, "frozen", {77}, {.init = Init::uniform(0, 1), .trainable = false});
  (void)model.parameter(b, "ones", {3}, {.init = Init::ones()});

  for (const Layout& layout : layouts_of_job()) {
    for (const DType compute : {DType::fp64, DType::fp32, DType::bf16}) {
      SCOPED_TRACE(layout.text() + " " + std::string(name(compute)));
      Config config;
      layout.apply(config);
      config.compute = compute;
      config.seed = 7;
      Engine engine(MPI_COMM_WORLD, model, config);
      engine.begin_evaluation();
      for (const UnitId unit : {a, b}) {
        const Lease lease = engine.gather(unit);
        for (const ParameterId id : model.parameters(unit)) {
          const ParameterSpec& spec = model.spec(id);
          const DType dtype = spec.options.dtype.value_or(compute);

          // Rounded to the master's dtype first, then to the parameter's.
          const auto differences = count_differences(model, lease, id, config, [&](std::int64_t i) {
            const double value = spec.options.init(7, id, i);
            return dtype == DType::fp64 ? value : static_cast<double>(static_cast<float>(value));
          });

          EXPECT_EQ(differences, 0) << spec.name;
        }
      }
    }
  }
}

}  // namespace
}  // namespace mics::test
