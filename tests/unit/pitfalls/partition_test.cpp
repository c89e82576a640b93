// SPDX-License-Identifier: Apache-2.0
// Pitfalls of partitioning: who owns which element, what padding holds, and that replicas start and
// stay equal.
#include "pitfall.hpp"
#include <mics/layout/flat_layout.hpp>
#include <mics/mics.hpp>
#include <mics/state/flat_model.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <complex>
#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace mics::test {
namespace {

constexpr std::int64_t beyond_32_bits = (std::int64_t{1} << 31) + 7;

/// Starts of parameters of these counts, each rounded up to 64 elements.
std::vector<std::int64_t> starts_of(const std::vector<std::int64_t>& counts) {
  std::vector<std::int64_t> starts;
  std::int64_t end = 0;
  for (const std::int64_t count : counts) {
    starts.push_back((end + 63) / 64 * 64);
    end = starts.back() + count;
  }
  return starts;
}

std::vector<std::int64_t> interesting_counts(std::int64_t p) {
  return {0, 1, p - 1, p, p + 1, 1009, 256 * p, beyond_32_bits, 3};
}

// Guards 64-bit offsets and the division of a buffer into equal shards. Seen to fail with the end
// of a parameter kept in 32 bits.
TEST(Pitfall, P05EveryElementBelongsToOneShardBeyond32Bits) {
  for (const int p : {1, 2, 3, 4, 6, 8}) {
    SCOPED_TRACE("p=" + std::to_string(p));
    const auto counts = interesting_counts(p);
    const auto starts = starts_of(counts);
    const std::int64_t end = starts.back() + counts.back();

    const auto flat = layout::FlatLayout::make(counts, p, 1);

    EXPECT_EQ(flat.count(), (end + 256 * p - 1) / (256 * p) * (256 * p));
    std::int64_t shards_end = 0;
    for (int tau = 0; tau < p; ++tau) {
      EXPECT_EQ(flat.shard(tau), (layout::Interval{shards_end, flat.count() / p}));
      shards_end += flat.count() / p;
    }
    EXPECT_EQ(shards_end, flat.count());
    std::int64_t in_gaps = 0;
    for (const auto& gap : flat.gaps()) in_gaps += gap.length;
    std::int64_t in_parameters = 0;
    for (const std::int64_t count : counts) in_parameters += count;
    EXPECT_EQ(in_gaps, flat.count() - in_parameters);
    for (std::size_t i = 0; i < counts.size(); ++i) {
      EXPECT_EQ(flat.parameter(static_cast<std::int64_t>(i)),
                (layout::Interval{starts[i], counts[i]}));
    }
  }
}

// The same for the tables that kernels read and the bytes that a plan promises. Seen to fail with
// the segments of a shard cut at 32 bits.
TEST(Pitfall, P05TablesAndPlansBeyond32Bits) {
  for (const int p : {1, 2, 3, 8}) {
    SCOPED_TRACE("p=" + std::to_string(p));
    const auto counts = interesting_counts(p);
    const auto starts = starts_of(counts);
    Model model;
    const UnitId unit = model.unit("unit");
    for (std::size_t i = 0; i < counts.size(); ++i) {
      (void)model.parameter(unit, "p" + std::to_string(i), {counts[i]},
                            {.weight_decay_factor = i % 2 == 0 ? 1.0 : 0.0});
    }
    const std::vector<int> nodes(static_cast<std::size_t>(p), 0);
    const Plan plan(model, layout::GroupLayout::make(nodes, p), {});
    const state::FlatBuffer& buffer = plan.flat().buffer(0);

    const std::int64_t shard = buffer.flat.count() / p;
    std::vector<std::int64_t> seen(counts.size());
    for (int tau = 0; tau < p; ++tau) {
      const std::int64_t first = tau * shard;
      for (const auto& part : state::tensor_segments(buffer, buffer.flat.shard(tau))) {
        const auto i = static_cast<std::size_t>(part.tensor);
        EXPECT_EQ(part.begin, std::max(starts[i], first) - first);
        EXPECT_EQ(part.end, std::min(starts[i] + counts[i], first + shard) - first);
        seen[i] += part.end - part.begin;
      }
      std::int64_t covered = 0;
      for (const auto& run : state::hyper_runs(model, buffer, buffer.flat.shard(tau))) {
        EXPECT_EQ(run.begin, covered);
        covered = run.end;
      }
      EXPECT_EQ(covered, shard);
    }
    EXPECT_EQ(seen, counts);
    EXPECT_EQ(plan.memory().compute_shards, 4 * shard);
    EXPECT_EQ(plan.memory().optimizer_states, 2 * 4 * shard);
  }
}

/// Parameters of every size that divides badly, of every dtype, frozen and complex ones, in two
/// units of which one is used twice a pass.
struct Awkward {
  Model model;
  UnitId tied, rest;
  std::vector<ParameterId> reals;
  ParameterId complex;

  static double initial(int parameter, std::int64_t i) {
    return coarse(static_cast<std::uint64_t>(parameter), static_cast<std::uint64_t>(i));
  }
  explicit Awkward(std::int64_t p) {
    const auto add = [&](UnitId unit, std::int64_t count, std::optional<DType> dtype,
                         bool trainable) {
      const int number = model.parameters();
      reals.push_back(model.parameter(
          unit, "p" + std::to_string(number), {count},
          {.init = Init::function([=](std::int64_t i) { return initial(number, i); }),
           .dtype = dtype,
           .trainable = trainable}));
    };
    tied = model.unit("tied");
    for (const std::int64_t n : {std::int64_t{0}, std::int64_t{1}, p - 1, p, p + 1}) {
      add(tied, n, {}, true);
    }
    rest = model.unit("rest");
    add(rest, 1009, {}, true);
    for (const DType dtype : {DType::fp64, DType::fp32, DType::bf16, DType::fp16}) {
      add(rest, p + 1, dtype, true);
      add(rest, 300, dtype, false);
    }
    add(rest, 256 * p, DType::bf16, true);
    complex = model.parameter(rest, "complex", {p + 2},
                              {.init = Init::complex_function([](std::int64_t i) {
                                 return std::complex<double>(initial(90, i), initial(91, i));
                               }),
                               .dtype = DType::fp32,
                               .complex = true});
  }
};

// Guards initialization, gathers, reductions and updates of shards that hold no element, a part of
// one tensor or several dtypes. Seen to fail with initial values taken by position in the shard
// instead of in the parameter.
TEST(Pitfall, P05AwkwardSizesAndDtypesTrainExactly) {
  for (const Layout& layout : pitfall_layouts()) {
    SCOPED_TRACE(layout.text());
    const Awkward model(layout.shape.p);
    Config config = toy_config();
    layout.apply(config);
    Engine engine(MPI_COMM_WORLD, model.model, config);
    const auto expect_values = [&](double change) {
      for (const ParameterId id : model.reals) {
        const bool trainable = model.model.spec(id).options.trainable;
        for (const char* array : {"compute", "master_weights"}) {
          expect_elements(
              array_of(engine, id, array),
              [&](std::int64_t i) {
                return Awkward::initial(id.value, i) + (trainable ? change : 0.0);
              },
              model.model.spec(id).name + " " + array);
        }
      }
      expect_elements(
          array_of(engine, model.complex, "compute"),
          [&](std::int64_t i) {
            return i % 2 == 0 ? Awkward::initial(90, i / 2) + change
                              : Awkward::initial(91, i / 2) - change;
          },
          "complex");
    };
    expect_values(0);

    // Two scopes of the tied unit add 1/4 and 1/2, the mean over ranks stays 3/4.
    engine.begin_micro_step({.samples = 1, .last = true});
    {
      HostScope outer = engine.gradient(model.tied);
      HostScope inner = engine.gradient(model.tied);
      for (const auto& [scope, value] : {std::pair{&outer, 0.25}, std::pair{&inner, 0.5}}) {
        for (const ParameterId id : model.model.parameters(model.tied)) {
          const auto d = scope->view<float*>(id);
          for (std::size_t i = 0; i < d.extent(0); ++i) d(i) += static_cast<float>(value);
        }
        scope->store();  // the other one adds to it
        if (scope == &inner) inner.reduce();
      }
      outer.reduce();
    }
    {
      HostScope scope = engine.gradient(model.rest);
      for (const ParameterId id : model.model.parameters(model.rest)) {
        const ParameterOptions& options = model.model.spec(id).options;
        if (!options.trainable) continue;
        if (options.complex) {
          const auto d = scope.view<Kokkos::complex<float>*>(id);
          for (std::size_t i = 0; i < d.extent(0); ++i) d(i) += Kokkos::complex<float>(0.75, -0.75);
          continue;
        }
        visit(options.dtype.value_or(DType::fp32), [&](auto tag) {
          using T = typename decltype(tag)::type;
          const auto d = scope.template view<T*>(id);
          for (std::size_t i = 0; i < d.extent(0); ++i) d(i) = static_cast<T>(0.75);
        });
      }
      scope.reduce();
    }
    EXPECT_FALSE(engine.step().get().skipped);

    expect_values(-0.75);
    // The tied unit is stored once: its five parameters start at 0, 0, 64, 128 and 192 (p > 1).
    const auto& buffers = engine.plan().flat().buffers_of(model.tied);
    ASSERT_EQ(buffers.size(), 1U);
    EXPECT_EQ(engine.plan().flat().buffer(buffers[0]).flat.count(), 256 * layout.shape.p);
  }
}

/// A built-in optimizer that looks at the padding of everything it is given, before and after.
class PaddingProbe final : public optim::Optimizer {
 public:
  explicit PaddingProbe(const OptimizerConfig& config) : inner_(optim::make_optimizer(config)) {}

  [[nodiscard]] std::string_view name() const override { return inner_->name(); }
  [[nodiscard]] std::vector<optim::StateSpec> states() const override { return inner_->states(); }
  [[nodiscard]] std::string describe() const override { return "probe of " + inner_->describe(); }
  [[nodiscard]] int norms_per_tensor() const override { return inner_->norms_per_tensor(); }
  [[nodiscard]] bool runs_on_device() const override { return true; }
  void add_norms(const optim::Slice& slice, const optim::StepInfo& info, std::span<double> norms,
                 std::span<double> partials) const override {
    inner_->add_norms(slice, info, norms, partials);
  }
  void update(const optim::Slice& slice, const optim::StepInfo& info) const override {
    look_at(slice, {});
    inner_->update(slice, info);
    look_at(slice, {});
  }
  void enqueue_norms(const Execution& exec, const optim::Slice& slice,
                     const optim::DeviceStepInfo* info, double* norms,
                     double* partials) const override {
    inner_->enqueue_norms(exec, slice, info, norms, partials);
  }
  void enqueue_update(const Execution& exec, const optim::Slice& slice,
                      const optim::DeviceStepInfo* info) const override {
    look_at(slice, exec);
    inner_->enqueue_update(exec, slice, info);
    look_at(slice, exec);
  }

  [[nodiscard]] std::int64_t seen() const { return seen_; }
  [[nodiscard]] std::int64_t not_zero() const { return not_zero_; }

 private:
  void look_at(const optim::Slice& slice, const Execution& exec) const {
    std::vector<bool> padding(static_cast<std::size_t>(slice.count), true);
    for (const auto& part : fetched(slice.tensors.data(), std::ssize(slice.tensors), exec)) {
      std::fill(padding.begin() + part.begin, padding.begin() + part.end, false);
    }
    const auto look = [&](const void* data, DType dtype) {
      if (data == nullptr) return;
      visit(dtype, [&](auto tag) {
        using T = typename decltype(tag)::type;
        const auto values = fetched(static_cast<const T*>(data), slice.count, exec);
        for (std::size_t i = 0; i < padding.size(); ++i) {
          if (!padding[i]) continue;
          ++seen_;
          const auto value = static_cast<double>(values[i]);
          if (value != 0 || std::signbit(value)) ++not_zero_;
        }
      });
    };
    look(slice.gradient, slice.gradient_dtype);
    look(slice.master_weights, slice.master_dtype);
    look(slice.compute, slice.compute_dtype);
    for (const void* state : slice.states) look(state, slice.master_dtype);
  }

  std::unique_ptr<optim::Optimizer> inner_;
  mutable std::int64_t seen_ = 0;
  mutable std::int64_t not_zero_ = 0;
};

/// Units whose gaps lie in different places, so that what one leaves in a slot lies in the gaps of
/// the next.
struct Gappy {
  Model model;
  std::vector<UnitId> units;
  std::vector<ParameterId> parameters;

  Gappy() {
    const auto add = [&](const char* name, const std::vector<std::int64_t>& counts) {
      units.push_back(model.unit(name));
      for (const std::int64_t count : counts) {
        parameters.push_back(model.parameter(units.back(), "p" + std::to_string(parameters.size()),
                                             {count}, {.init = Init::constant(1.5)}));
      }
    };
    add("full", {2048});
    add("gaps", {1, 65, 0, 3, 130});
    add("few", {5});
  }
};

/// Runs two steps of two micro-steps that write 1/2 to every gradient, over slots that hold other
/// units' gradients, and looks at all padding.
template <class T>
void expect_padding_zero(const Layout& layout, OptimizerKind kind, GradientMode mode) {
  if (!in_sample()) return;
  SCOPED_TRACE(layout.text() + " " + std::string(name(kind)) + " " +
               std::string(name(dtype_of<T>)));
  const Gappy gappy;
  Config config = toy_config();
  layout.apply(config);
  config.compute = dtype_of<T>;
  config.slots = 1;
  config.optimizer = {
      .kind = kind, .learning_rate = 0.25, .weight_decay = 0.5, .momentum = 0.5, .ema_decay = 0.5};
  const auto probe = std::make_shared<PaddingProbe>(config.optimizer);
  config.custom_optimizer = probe;
  Engine engine(MPI_COMM_WORLD, gappy.model, config);
  std::int64_t elements = 0;
  for (const ParameterId id : gappy.parameters) elements += gappy.model.spec(id).count;

  for (int step = 0; step < 2; ++step) {
    for (const bool last : {false, true}) {
      engine.begin_micro_step({.samples = 1, .last = last});
      for (const UnitId unit : gappy.units) {
        {
          const Lease lease = engine.gather(unit);
          const ParameterId id = gappy.model.parameters(unit)[0];
          const auto w = lease.template view<const T*>(id);
          // The parameter starts its buffer: what follows it up to 64 elements is padding.
          const auto extent = static_cast<std::int64_t>(w.extent(0));
          const auto all = fetched(w.data(), (extent + 63) / 64 * 64);
          for (auto i = static_cast<std::size_t>(extent); i < all.size(); ++i) {
            ASSERT_EQ(static_cast<double>(all[i]), 0) << "gathered padding, element " << i;
          }
        }
        HostScope scope = engine.gradient(unit, mode);
        for (const ParameterId id : gappy.model.parameters(unit)) {
          const auto d = scope.template view<T*>(id);
          for (std::size_t i = 0; i < d.extent(0); ++i) d(i) = static_cast<T>(0.5);
        }
        scope.reduce();
      }
    }
    const StepResult result = engine.step().get();

    EXPECT_FALSE(result.overflow);
    EXPECT_DOUBLE_EQ(result.gradient_norm, 0.5 * std::sqrt(static_cast<double>(elements)));
  }
  EXPECT_GT(sum_over_job(probe->seen()), 0) << "the layout has no padding";
  EXPECT_EQ(probe->not_zero(), 0);
}

// Guards the clearing of gaps where a slot is overwritten, which the norm, hop 1 and the optimizers
// (decay, epsilon of 0) then leave alone. Seen to fail with gaps not cleared in overwrite mode,
// with the slot not cleared in add mode, and with the arena's memory not zero at the start.
TEST(Pitfall, P06PaddingIsZeroAndStaysZero) {
  for (const Layout& layout : pitfall_layouts()) {
    for (const GradientMode mode : {GradientMode::overwrite, GradientMode::add}) {
      expect_padding_zero<float>(layout, OptimizerKind::adamw, mode);
    }
    for (const OptimizerKind kind : {OptimizerKind::adam, OptimizerKind::sgd, OptimizerKind::lion,
                                     OptimizerKind::adagrad, OptimizerKind::lamb}) {
      expect_padding_zero<bf16>(layout, kind, GradientMode::overwrite);
    }
    expect_padding_zero<fp16>(layout, OptimizerKind::adamw, GradientMode::overwrite);
    expect_padding_zero<double>(layout, OptimizerKind::lamb, GradientMode::overwrite);
  }
}

// Guards initial values from a generator that is keyed by element, not by rank: the generators of
// the ranks differ on purpose. Seen to fail with the rank mixed into the seed, and with the shard
// group.
TEST(Pitfall, P07ReplicasStartEqualWhateverTheRanksSeed) {
  std::srand(2222U + static_cast<unsigned>(job_rank()));
  Model model;
  const UnitId unit = model.unit("unit");
  const ParameterId normal =
      model.parameter(unit, "normal", {61, 53}, {.init = Init::normal(0.02)});
  const ParameterId uniform =
      model.parameter(unit, "uniform", {999}, {.init = Init::uniform(-1, 1), .dtype = DType::bf16});
  std::vector<double> of_first_layout;
  for (const Layout& layout : pitfall_layouts()) {
    SCOPED_TRACE(layout.text());
    Config config = toy_config();
    layout.apply(config);
    config.seed = 99;

    Engine engine(MPI_COMM_WORLD, model, config);

    const auto values = state_of(engine);
    expect_same_on_all_ranks(values, "initial values");
    if (of_first_layout.empty()) of_first_layout = values;
    EXPECT_EQ(values, of_first_layout) << "the layout changes initial values";
    const auto drawn = array_of(engine, normal, "master_weights");
    double square = 0;
    for (const double value : drawn) square += value * value;
    EXPECT_NEAR(std::sqrt(square / static_cast<double>(drawn.size())), 0.02, 0.002);
    EXPECT_NE(array_of(engine, uniform, "compute")[0], array_of(engine, uniform, "compute")[1]);
  }
}

// Guards the comparison of replicas against an application whose initial values differ between
// ranks, which no generator of the library can prevent. Seen to fail with the comparison of
// checksums taken out.
TEST(Pitfall, P07ReplicasThatStartDifferentAreFound) {
  if (job_size() == 1) return;  // one replica
  Model model;
  const UnitId unit = model.unit("unit");
  const double own = std::rand() % 2 + 2 * job_rank();  // NOLINT: differs between ranks on purpose
  const ParameterId id = model.parameter(
      unit, "weight", {300}, {.init = Init::function([=](std::int64_t) { return own; })});
  Config config = toy_config();
  config.preset = Preset::ddp;
  config.replica_check_every = 1;
  config.timeout = 5;
  Engine engine(MPI_COMM_WORLD, model, config);
  engine.begin_micro_step({.samples = 1, .last = true});
  HostScope scope = engine.gradient(unit);
  scope.view<float*>(id)(0) = 1;
  scope.reduce();

  expect_error<CommError>([&] { engine.step(); }, {"unit", "same bits", "rank "});
  EXPECT_FALSE(engine.alive());
  MPI_Barrier(MPI_COMM_WORLD);
}

// Guards hop 2 and the gathers after an update: what one rank alone contributes changes the
// gathered parameters of every replica, to the same bits. Seen to fail with hop 2 left out, and
// with gathered units kept over a step.
TEST(Pitfall, P08UpdateReachesEveryRankOfEveryReplica) {
  const Toy toy(2);
  for (const Layout& layout : pitfall_layouts()) {
    SCOPED_TRACE(layout.text());
    Config config = toy_config();
    layout.apply(config);
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    for (int step = 0; step < 3; ++step) {
      const int writer = step % job_size();
      engine.begin_micro_step({.samples = job_rank() == writer ? 4 : 0, .last = true});
      for (std::size_t u = 0; u < 2; ++u) {
        backward_unit(engine, toy, u, job_rank() == writer ? 2.0F : 0.0F);
      }
      EXPECT_EQ(engine.step().get().samples, 4);

      engine.begin_evaluation();
      for (std::size_t u = 0; u < 2; ++u) {
        const Lease lease = engine.gather(toy.units[u]);
        EXPECT_EQ(count_differences(toy.model, lease, toy.weight[u], engine.config(),
                                    [&](std::int64_t i) {
                                      return toy.initial(toy.weight[u], i) - 0.5 * (step + 1);
                                    }),
                  0)
            << "gathered after step " << step;
      }
      expect_same_on_all_ranks(state_of(engine), "weights");
    }
  }
}

}  // namespace
}  // namespace mics::test
