// SPDX-License-Identifier: Apache-2.0
// Every (W, p) and preset goes on from what every other saved. A sample of the pairs, unless
// MICS_EXHAUSTIVE is set.
#include "dense_reference.hpp"
#include "first_ranks.hpp"
#include "layouts.hpp"
#include "small_net.hpp"
#include "toy.hpp"
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/mics.hpp>
#include <support/shared_folder.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <array>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

namespace mics::test {
namespace {

constexpr int steps_before = 3;
constexpr int steps_after = 5;

struct Placement {
  int world = 1;
  Preset preset = Preset::mics;
  int p = 1;

  void apply(Config& config) const {
    config.preset = preset;
    config.shard_size = preset == Preset::mics ? p : 0;
  }
  [[nodiscard]] std::string text() const {
    return std::to_string(world) + " ranks, " + std::string(name(preset)) +
           ", p=" + std::to_string(p);
  }
};

std::vector<Placement> placements_of(int world) {
  std::vector<Placement> all{
      {world, Preset::ddp, 1}, {world, Preset::zero2, world}, {world, Preset::zero3, world}};
  for (int p = 1; p <= world; ++p) {
    if (world % p == 0) all.push_back({world, Preset::mics, p});
  }
  return all;
}

std::vector<Placement> all_placements() {
  std::vector<Placement> all;
  for (const int world : {1, 2, 3, 4, 5, 6, 8}) {
    const auto some = placements_of(world);
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

bool is_exhaustive() { return std::getenv("MICS_EXHAUSTIVE") != nullptr; }

/// Whether a pair is tried; the same on every rank.
bool is_drawn(std::size_t from, std::size_t to) {
  return is_exhaustive() || scramble(1000 * from + to) % 24 == 0 || (from == to && from % 6 == 0);
}

/// All ranks of the job meet. Those that come early sleep: they would take the cores from the
/// others.
void meet() {
  MPI_Request request = MPI_REQUEST_NULL;
  MPI_Ibarrier(MPI_COMM_WORLD, &request);
  for (int done = 0; done == 0;) {
    MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (done == 0) std::this_thread::sleep_for(std::chrono::microseconds(500));
  }
}

void broadcast(std::vector<double>& values) {
  auto count = static_cast<int>(values.size());
  MPI_Bcast(&count, 1, MPI_INT, 0, MPI_COMM_WORLD);
  values.resize(static_cast<std::size_t>(count));
  MPI_Bcast(values.data(), count, MPI_DOUBLE, 0, MPI_COMM_WORLD);
}

/// Every array of every parameter, as this rank's shard group holds it.
std::vector<double> whole_state(Engine& engine, const std::vector<std::string>& states) {
  std::vector<double> all;
  for (int i = 0; i < engine.model().parameters(); ++i) {
    const ParameterSpec& spec = engine.model().spec({i});
    std::vector<double> values(static_cast<std::size_t>(spec.count));
    engine.read({i}, values);
    all.insert(all.end(), values.begin(), values.end());
    if (!spec.options.trainable) continue;
    for (const std::string& state : states) {
      engine.read({i}, values, state);
      all.insert(all.end(), values.begin(), values.end());
    }
  }
  return all;
}

/// What a run does in a step, and what is known of its result.
class Workload {
 public:
  virtual ~Workload() = default;
  [[nodiscard]] virtual const Model& model() const = 0;
  [[nodiscard]] virtual std::vector<std::string> states() const = 0;
  /// \param number  of the pair: dtypes and thresholds that change no bit differ with it
  [[nodiscard]] virtual Config config(std::size_t number) const = 0;
  virtual void step(Engine& engine, int step) const = 0;
  /// After the last step of a run whose layout changed. `whole` is the source's own last state.
  virtual void expect_continued(Engine& engine, const std::vector<double>& whole) const = 0;
};

/// SGD with momentum in powers of two: sums and updates are exact, so that all layouts and compute
/// dtypes hold the same bits.
class ExactSums : public Workload {
 public:
  [[nodiscard]] const Model& model() const override { return toy_.model; }
  [[nodiscard]] std::vector<std::string> states() const override { return {"momentum_buffer"}; }
  [[nodiscard]] Config config(std::size_t number) const override {
    Config config = toy_config();
    config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 0.25, .momentum = 0.5};
    config.compute = std::array{DType::fp32, DType::bf16, DType::fp16}[number % 3];
    config.gradient = DType::fp32;
    config.persistence_threshold = number % 2 == 0 ? 0 : 100;
    return config;
  }
  void step(Engine& engine, int step) const override {
    const int bringer = step % engine.size();
    const bool brings = engine.rank() == bringer;
    engine.begin_micro_step({.samples = brings ? 1 : 0, .last = true});
    for (std::size_t u = toy_.units.size(); u-- > 0;) {
      const auto value = static_cast<float>((step % 4 + 1) * static_cast<int>(u + 1));
      backward_unit(engine, toy_, u, brings ? value : 0.0F);
    }
    (void)engine.step();
  }
  void expect_continued(Engine& engine, const std::vector<double>& whole) const override {
    EXPECT_EQ(whole_state(engine, states()), whole);
  }

 private:
  Toy toy_;
};

/// AdamW with clipping, whose sums are rounded in each layout's own order.
class RoundedSums : public Workload {
 public:
  RoundedSums() : reference_(net_, config(0)) {
    for (int step = 0; step < steps_before + steps_after; ++step) {
      (void)reference_.step(batches_.all(step));
    }
  }
  [[nodiscard]] const Model& model() const override { return net_.model; }
  [[nodiscard]] std::vector<std::string> states() const override {
    return {"exp_avg", "exp_avg_sq"};
  }
  [[nodiscard]] Config config(std::size_t) const override {
    Config config;
    config.timeout = 20;
    config.optimizer = {.kind = OptimizerKind::adamw,
                        .learning_rate = 1e-2,
                        .betas = {0.9, 0.99},
                        .epsilon = 1e-8,
                        .weight_decay = 0.1};
    config.gradient_clipping = 4.0;
    return config;
  }
  void step(Engine& engine, int step) const override {
    SmallNetClient<float> client(engine, net_);
    client.micro_step(batches_.part(step, 0, 1, engine.rank(), engine.size()), true, Tied::nested);
    EXPECT_FALSE(engine.step().get().skipped);
  }
  void expect_continued(Engine& engine, const std::vector<double>&) const override {
    constexpr double tolerance = 1e-5;  // of the fp32 runs against the reference
    for (int i = 0; i < net_.model.parameters(); ++i) {
      const ParameterSpec& spec = net_.model.spec({i});
      std::vector<double> values(static_cast<std::size_t>(spec.count));
      engine.read({i}, values);
      EXPECT_LE(relative_difference(values, reference_.weights({i})), tolerance) << spec.name;
    }
  }

 private:
  SmallNet net_;
  Batches batches_;
  DenseReference reference_;
};

std::uint32_t digest_of(const std::string& directory, std::int64_t step) {
  return checkpoint::Checkpoint::open(
             checkpoint::SystemCalls::native(),
             std::filesystem::path(directory) / checkpoint::step_name(step))
      .commit()
      .digest;
}

/// All pairs whose source has `world` ranks.
void expect_pairs(const Workload& workload, int world) {
  const SharedFolder folder;
  const std::vector<Placement> all = all_placements();
  int tried = 0;
  for (std::size_t f = 0; f < all.size(); ++f) {
    const Placement& from = all[f];
    if (from.world != world) continue;
    std::vector<std::size_t> targets;
    for (std::size_t t = 0; t < all.size(); ++t) {
      if (is_drawn(f, t)) targets.push_back(t);
    }
    if (targets.empty()) continue;
    const std::string directory = folder.in(std::to_string(f));
    std::vector<double> saved;
    std::vector<double> whole;
    {
      const FirstRanks ranks(from.world);
      if (ranks.comm() != MPI_COMM_NULL) {
        SCOPED_TRACE("saved by " + from.text());
        Config config = workload.config(f);
        from.apply(config);
        Engine engine(ranks.comm(), workload.model(), config);
        for (int step = 0; step < steps_before; ++step) workload.step(engine, step);
        saved = whole_state(engine, workload.states());
        engine.save(directory);
        for (int step = steps_before; step < steps_before + steps_after; ++step) {
          workload.step(engine, step);
        }
        whole = whole_state(engine, workload.states());
      }
    }
    meet();
    broadcast(saved);
    broadcast(whole);
    for (const std::size_t t : targets) {
      const Placement& to = all[t];
      ++tried;
      meet();
      const FirstRanks ranks(to.world);
      if (ranks.comm() == MPI_COMM_NULL) continue;
      SCOPED_TRACE("saved by " + from.text() + "; loaded by " + to.text());
      Config config = workload.config(f + t);
      to.apply(config);
      config.seed = 99;  // other initial values
      Engine engine(ranks.comm(), workload.model(), config);

      const auto loaded = engine.load(directory);

      ASSERT_TRUE(loaded.has_value());
      EXPECT_EQ(loaded->step, steps_before);
      EXPECT_EQ(whole_state(engine, workload.states()), saved);
      // What it saves has the digest of what it loaded.
      const std::string again = folder.in("again" + std::to_string(to.world % 2));
      engine.save(again, {.retention = {.keep = 1}});
      EXPECT_EQ(digest_of(again, steps_before), loaded->digest);
      for (int step = steps_before; step < steps_before + steps_after; ++step) {
        workload.step(engine, step);
      }
      if (from.world == to.world && from.p == to.p) {
        EXPECT_EQ(whole_state(engine, workload.states()), whole);
      } else {
        workload.expect_continued(engine, whole);
      }
    }
    meet();
  }
  EXPECT_GT(tried, 0);
  if (is_exhaustive()) {
    EXPECT_EQ(tried, static_cast<int>(placements_of(world).size() * all.size()));
  }
}

class LayoutPairs : public testing::TestWithParam<int> {};

// Fails if a state, a count of updates or a shard's place is lost between layouts.
TEST_P(LayoutPairs, GoOnBitForBitWhereSumsAreExact) { expect_pairs(ExactSums(), GetParam()); }

TEST_P(LayoutPairs, GoOnWithinTheOraclesBoundsWhereTheyAreNot) {
  expect_pairs(RoundedSums(), GetParam());
}

INSTANTIATE_TEST_SUITE_P(SavedBy, LayoutPairs, testing::Values(1, 2, 3, 4, 5, 6, 8),
                         testing::PrintToStringParamName());

}  // namespace
}  // namespace mics::test
