// SPDX-License-Identifier: Apache-2.0
// Engines that save, and others, of other sizes, presets and dtypes, that go on from there.
#include "layouts.hpp"
#include "toy.hpp"
#include <mics/mics.hpp>
#include <support/shared_folder.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <optional>
#include <string>
#include <vector>

namespace mics::test {
namespace {

/// The first `size` ranks of the job, or null on the others.
class FirstRanks {
 public:
  explicit FirstRanks(int size) {
    MPI_Comm_split(MPI_COMM_WORLD, job_rank() < size ? 0 : MPI_UNDEFINED, job_rank(), &comm_);
  }
  ~FirstRanks() {
    if (comm_ != MPI_COMM_NULL) MPI_Comm_free(&comm_);
  }
  FirstRanks(const FirstRanks&) = delete;
  FirstRanks& operator=(const FirstRanks&) = delete;
  [[nodiscard]] MPI_Comm comm() const { return comm_; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
};

Config momentum_config() {
  Config config = toy_config();
  // Powers of two throughout, so that sums and updates are exact in every layout.
  config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 0.25, .momentum = 0.5};
  return config;
}

/// A mean gradient of `value` whatever the number of ranks: rank 0 brings the only sample.
void one_sample_step(Engine& engine, const Toy& toy, float value) {
  const bool brings = engine.rank() == 0;
  engine.begin_micro_step({.samples = brings ? 1 : 0, .last = true});
  for (std::size_t u = toy.units.size(); u-- > 0;) {
    backward_unit(engine, toy, u, brings ? value * static_cast<float>(u + 1) : 0.0F);
  }
  (void)engine.step();
}

std::vector<double> whole_state(Engine& engine) {
  std::vector<double> all = all_values(engine);
  for (int i = 0; i < engine.model().parameters(); ++i) {
    std::vector<double> values(static_cast<std::size_t>(engine.model().spec({i}).count));
    engine.read({i}, values, "momentum_buffer");
    all.insert(all.end(), values.begin(), values.end());
  }
  return all;
}

/// What a run without interruption holds after each step.
std::vector<std::vector<double>> uninterrupted(const Toy& toy, int steps) {
  std::vector<std::vector<double>> states;
  Engine engine(MPI_COMM_SELF, toy.model, momentum_config());
  for (int step = 0; step < steps; ++step) {
    engine.begin_micro_step({.samples = 1, .last = true});
    for (std::size_t u = toy.units.size(); u-- > 0;) {
      backward_unit(engine, toy, u, static_cast<float>((step % 4 + 1) * static_cast<int>(u + 1)));
    }
    (void)engine.step();
    states.push_back(whole_state(engine));
  }
  return states;
}

std::vector<int> divisors(int n) {
  std::vector<int> all;
  for (int d = 1; d <= n; ++d) {
    if (n % d == 0) all.push_back(d);
  }
  return all;
}

// Fails if a state, a count of updates or a shard's place is lost between layouts.
TEST(EngineCheckpoint, GoesOnBitForBitInEveryLayoutOfEveryNumberOfRanks) {
  const Toy toy;
  const SharedFolder folder;
  const auto expected = uninterrupted(toy, 5);
  for (int from = 1; from <= job_size(); ++from) {
    for (const int p : divisors(from)) {
      const std::string directory = folder.in(std::to_string(from) + "_" + std::to_string(p));
      std::optional<std::uint32_t> digest;
      {
        const FirstRanks ranks(from);
        if (ranks.comm() != MPI_COMM_NULL) {
          Config config = momentum_config();
          config.preset = Preset::mics;
          config.shard_size = p;
          Engine engine(ranks.comm(), toy.model, config);
          for (int step = 0; step < 3; ++step) {
            one_sample_step(engine, toy, static_cast<float>(step % 4 + 1));
          }
          engine.save(directory, {.blobs = {{"note", {std::byte{7}}}}});
        }
      }
      MPI_Barrier(MPI_COMM_WORLD);
      for (int to = 1; to <= job_size(); ++to) {
        for (const int q : divisors(to)) {
          SCOPED_TRACE("saved by " + std::to_string(from) + " ranks, p=" + std::to_string(p) +
                       ", loaded by " + std::to_string(to) + ", p=" + std::to_string(q));
          const FirstRanks ranks(to);
          if (ranks.comm() == MPI_COMM_NULL) continue;
          Config config = momentum_config();
          config.preset = Preset::mics;
          config.shard_size = q;
          config.seed = 99;  // other initial values
          config.persistence_threshold = to % 2 == 0 ? 100 : 0;
          Engine engine(ranks.comm(), toy.model, config);

          const auto loaded = engine.load(directory);

          ASSERT_TRUE(loaded.has_value());
          EXPECT_EQ(loaded->step, 3);
          EXPECT_EQ(loaded->blobs, (Blobs{{"note", {std::byte{7}}}}));
          if (!digest) digest = loaded->digest;
          EXPECT_EQ(loaded->digest, *digest);
          EXPECT_EQ(whole_state(engine), expected[2]);
          for (int step = 3; step < 5; ++step) {
            one_sample_step(engine, toy, static_cast<float>(step % 4 + 1));
          }
          EXPECT_EQ(whole_state(engine), expected[4]);
        }
      }
      MPI_Barrier(MPI_COMM_WORLD);
    }
  }
}

TEST(EngineCheckpoint, OtherComputeDtypesTakeTheWeightsRounded) {
  const Toy toy;
  const SharedFolder folder;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  one_sample_step(engine, toy, 1);
  engine.save(folder.in("run"));
  const auto weights = all_values(engine);

  for (const Preset preset : {Preset::ddp, Preset::zero2, Preset::zero3}) {
    Config config = momentum_config();
    config.preset = preset;
    config.compute = DType::bf16;
    Engine other(MPI_COMM_WORLD, toy.model, config);
    ASSERT_TRUE(other.load(folder.in("run")).has_value());

    EXPECT_EQ(all_values(other), weights);
    const auto rounded = values_of(other, toy.weight[1], false);
    const auto exact = values_of(other, toy.weight[1]);
    other.begin_evaluation();
    const Lease lease = other.gather(toy.units[1]);
    const auto view = lease.view<const bf16**>(toy.weight[1]);
    for (std::size_t i = 0; i < exact.size(); ++i) {
      EXPECT_EQ(rounded[i], static_cast<double>(bf16(exact[i])));
      EXPECT_EQ(static_cast<double>(view(i / 17, i % 17)), rounded[i]);
    }
  }
}

TEST(EngineCheckpoint, AsynchronousSaveHoldsTheStateOfItsStep) {
  const Toy toy;
  const SharedFolder folder;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  one_sample_step(engine, toy, 1);
  const auto saved = whole_state(engine);

  engine.save(folder.in("run"), {.asynchronous = true});
  one_sample_step(engine, toy, 2);
  checkpoint::SaveProgress progress = engine.poll_save();
  while (progress.phase == checkpoint::SavePhase::staged) progress = engine.poll_save();

  EXPECT_EQ(progress.phase, checkpoint::SavePhase::committed) << progress.error;
  EXPECT_EQ(progress.step, 1);
  EXPECT_NE(whole_state(engine), saved);
  EXPECT_EQ(engine.load(folder.in("run"))->step, 1);
  EXPECT_EQ(whole_state(engine), saved);
}

TEST(EngineCheckpoint, WeightsOnlyLeaveTheOptimizerAlone) {
  const Toy toy;
  const SharedFolder folder;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  one_sample_step(engine, toy, 1);
  engine.save(folder.in("run"));
  Engine fresh(MPI_COMM_WORLD, toy.model, momentum_config());
  const auto momentum = [&](Engine& of) {
    std::vector<double> values(32 * 17);
    of.read(toy.weight[0], values, "momentum_buffer");
    return values;
  };

  ASSERT_TRUE(fresh.load(folder.in("run"), {.weights_only = true}).has_value());

  EXPECT_EQ(all_values(fresh), all_values(engine));
  EXPECT_EQ(momentum(fresh), std::vector<double>(32 * 17, 0.0));
}

TEST(EngineCheckpoint, RetentionAndNamedSteps) {
  const Toy toy;
  const SharedFolder folder;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  std::vector<std::vector<double>> states;
  for (int step = 1; step <= 5; ++step) {
    one_sample_step(engine, toy, 1);
    states.push_back(whole_state(engine));
    engine.save(folder.in("run"), {.retention = {.keep = 2, .keep_every = 2}});
  }

  EXPECT_EQ(checkpoint::list_steps(folder.in("run")), (std::vector<std::int64_t>{5, 4, 2}));
  EXPECT_EQ(engine.load(folder.in("run"), {.step = 2})->step, 2);
  EXPECT_EQ(whole_state(engine), states[1]);
  EXPECT_EQ(engine.load(folder.in("run"))->step, 5);
  EXPECT_EQ(whole_state(engine), states[4]);
}

TEST(EngineCheckpoint, MisuseIsNamedOnEveryRank) {
  const Toy toy;
  const SharedFolder folder;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  EXPECT_FALSE(engine.load(folder.in("nothing")).has_value());
  one_sample_step(engine, toy, 1);
  engine.save(folder.in("run"));

  engine.begin_micro_step({.samples = 1, .last = true});
  expect_error<StateError>([&] { engine.save(folder.in("run")); }, {"save", "between steps"});
  expect_error<StateError>([&] { (void)engine.load(folder.in("run")); }, {"load", "between steps"});
  for (std::size_t u = toy.units.size(); u-- > 0;) backward_unit(engine, toy, u, 1);
  (void)engine.step();

  Model other;
  const UnitId unit = other.unit("a");
  (void)other.parameter(unit, "weight", {32, 16});
  Engine wrong(MPI_COMM_WORLD, other, momentum_config());
  expect_error<FormatError>([&] { (void)wrong.load(folder.in("run")); }, {"a/weight", "32", "17"});
}

TEST(EngineCheckpoint, ReplicasThatDifferAreNotSaved) {
  if (job_size() == 1) return;  // one replica
  const Toy toy;
  const SharedFolder folder;
  Config config = momentum_config();
  config.preset = Preset::ddp;
  Engine engine(MPI_COMM_WORLD, toy.model, config);
  one_sample_step(engine, toy, 1);
  if (job_rank() == 1) {
    // A whole replica's gathered unit is its shard: as broken memory would.
    engine.begin_evaluation();
    const Lease lease = engine.gather(toy.units[2]);
    *const_cast<float*>(lease.view<const float*>(toy.bias[2]).data()) += 1;
  }

  expect_error<FormatError>([&] { engine.save(folder.in("run")); }, {"replica", "rank"});
  EXPECT_TRUE(checkpoint::list_steps(folder.in("run")).empty());
}

}  // namespace
}  // namespace mics::test
