// SPDX-License-Identifier: Apache-2.0
// Engines that save, and others, of other sizes, presets and dtypes, that go on from there.
#include "first_ranks.hpp"
#include "layouts.hpp"
#include "toy.hpp"
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/file_system.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/mics.hpp>
#include <support/shared_folder.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

namespace mics::test {
namespace {

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
    const auto view = host_view<const bf16**>(lease, toy.weight[1]);
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

// Fails if what the save of another optimizer lacks is taken for damage, which an older step mends.
TEST(EngineCheckpoint, AnotherOptimizersStatesAreNamedAndNoOlderStepIsTaken) {
  const Toy toy;
  const SharedFolder folder;
  Config plain = momentum_config();
  plain.optimizer.momentum = 0;
  {
    Engine first(MPI_COMM_WORLD, toy.model, momentum_config());
    one_sample_step(first, toy, 1);
    first.save(folder.in("run"));
  }
  {
    Engine other(MPI_COMM_WORLD, toy.model, plain);
    ASSERT_EQ(other.load(folder.in("run"))->step, 1);  // needs less than there is
    one_sample_step(other, toy, 1);
    other.save(folder.in("run"));
  }
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  one_sample_step(engine, toy, 2);
  const auto before = whole_state(engine);

  expect_error<FormatError>(
      [&] { (void)engine.load(folder.in("run")); },
      {"momentum_buffer of parameter \"a/weight\"", "step-000000002", "beside master_weights"});

  EXPECT_EQ(whole_state(engine), before);
  EXPECT_EQ(engine.load(folder.in("run"), {.weights_only = true})->step, 2);
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

// Fails if what ranks ask for apart is taken from one of them, or only ends in a timeout.
TEST(EngineCheckpoint, RanksThatAskForDifferentThingsAreRefused) {
  if (job_size() == 1) return;  // it agrees with itself
  const Toy toy;
  const SharedFolder folder;
  const bool first = job_rank() == 0;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  const std::string run = folder.in("run");
  expect_error<ArgumentError>([&] { engine.save(first ? run : folder.in("other")); },
                              {"directory to save to", "the same on every rank"});
  const Blobs blobs{{"random state", {first ? std::byte{1} : std::byte{2}}}};
  for (const bool asynchronous : {false, true}) {
    expect_error<ArgumentError>(
        [&] { engine.save(run, {.asynchronous = asynchronous, .blobs = blobs}); },
        {"blobs to save", "the same on every rank"});
  }
  engine.save(run, {.blobs = {{"random state", {std::byte{3}}}}});
  for (const bool asynchronous : {false, true}) {
    expect_error<ArgumentError>(
        [&] { engine.save(first ? run : folder.in("other"), {.asynchronous = asynchronous}); },
        {"directory to save to", run, folder.in("other"), "the same on every rank"});
  }
  expect_error<ArgumentError>([&] { engine.save(run, {.asynchronous = first}); },
                              {"directory to save to", run + ", asynchronously", run + ", keep"});
  expect_error<ArgumentError>([&] { engine.save(run, {.retention = {.keep = first ? 1 : 2}}); },
                              {"directory to save to", "keep 1", "keep 2"});
  expect_error<ArgumentError>(
      [&] {
        engine.save(run, {.blobs = {{first ? "a" : "\xff", {}}}});
      },
      {"blobs to save"});
  expect_error<ArgumentError>([&] { engine.save(run, {.blobs = {{"\xff", {}}}}); }, {"UTF-8"});
  expect_error<ArgumentError>([&] { engine.claim_directory(first ? folder.in("other") : run); },
                              {"directory to save to", run, folder.in("other")});
  const std::string differs = "the same on every rank";
  expect_error<ArgumentError>([&] { (void)engine.load(run, {.step = first ? 0 : 1}); },
                              {"checkpoint to load", differs});
  expect_error<ArgumentError>([&] { (void)engine.load(run, {.weights_only = first}); },
                              {"checkpoint to load", differs});
  expect_error<ArgumentError>([&] { (void)engine.load(first ? run : folder.in("other")); },
                              {"checkpoint to load", differs});
  // It was refused before anything was changed, and the engine goes on.
  EXPECT_TRUE(engine.load(run).has_value());
  one_sample_step(engine, toy, 1);
}

/// The gradient of every unit is `value` times its number, on state in host memory or a device's.
void step_in(Engine& engine, const Toy& toy, Memory memory, float value) {
  if (memory == Memory::device) return one_sample_step(engine, toy, value);
  const bool brings = engine.rank() == 0;
  engine.begin_micro_step({.samples = brings ? 1 : 0, .last = true});
  for (std::size_t u = toy.units.size(); u-- > 0;) {
    auto scope = engine.gradient(toy.units[u]);
    using Right = Kokkos::LayoutRight;
    const auto dw = scope.view<float**, Right, Kokkos::HostSpace>(toy.weight[u]);
    const auto db = scope.view<float*, Right, Kokkos::HostSpace>(toy.bias[u]);
    const float mine = brings ? value * static_cast<float>(u + 1) : 0.0F;
    for (std::size_t i = 0; i < dw.size(); ++i) dw.data()[i] += mine;
    for (std::size_t i = 0; i < db.size(); ++i) db.data()[i] += mine;
    scope.reduce();
  }
  (void)engine.step();
}

// Fails if anything of a step, its numbers or what is stored depends on where the state is.
TEST(EngineCheckpoint, StateMovesBetweenHostAndDeviceAndBackBitForBit) {
  const Toy toy;
  const SharedFolder folder;
  const auto expected = uninterrupted(toy, 8);
  for (const Layout& layout : layouts_of_job()) {
    for (const Memory first : {Memory::host, Memory::device}) {
      SCOPED_TRACE(layout.text() + ", first in " + std::string(name(first)) + " memory");
      const std::string directory = folder.in(layout.text() + std::string(name(first)));
      Memory memory = first;
      std::optional<std::uint32_t> digest;
      // Saved in one memory, loaded and saved unchanged in the other, and back.
      for (int stay = 0; stay < 3; ++stay) {
        Config config = momentum_config();
        layout.apply(config);
        config.memory = memory;
        config.seed = 100 + static_cast<std::uint64_t>(stay);  // other initial values
        if (stay == 0) config.seed = momentum_config().seed;
        Engine engine(MPI_COMM_WORLD, toy.model, config);
        if (stay > 0) {
          const auto loaded = engine.load(directory);
          ASSERT_TRUE(loaded.has_value());
          EXPECT_EQ(loaded->step, 2 * stay);
          EXPECT_EQ(whole_state(engine), expected[static_cast<std::size_t>(2 * stay - 1)]);
          digest = loaded->digest;
          engine.save(directory + "_again" + std::to_string(stay));
          EXPECT_EQ(engine.load(directory + "_again" + std::to_string(stay))->digest, *digest);
        }
        for (int step = 2 * stay; step < 2 * stay + 2; ++step) {
          step_in(engine, toy, memory, static_cast<float>(step % 4 + 1));
        }
        EXPECT_EQ(whole_state(engine), expected[static_cast<std::size_t>(2 * stay + 1)]);
        engine.save(directory);
        memory = memory == Memory::host ? Memory::device : Memory::host;
      }
    }
  }
}

/// The text of the error of a load, the same on every rank; empty if there was none.
std::string line_of_load(Engine& engine, const std::string& directory,
                         std::optional<std::int64_t> step = {}) {
  std::string line;
  try {
    (void)engine.load(directory, {.step = step});
  } catch (const Error& error) {
    line = error.what();
  }
  EXPECT_EQ(line.find('\n'), std::string::npos) << line;
  std::array<char, 4096> of_root{};
  line.copy(of_root.data(), of_root.size() - 1);
  MPI_Bcast(of_root.data(), static_cast<int>(of_root.size()), MPI_CHAR, 0, MPI_COMM_WORLD);
  EXPECT_EQ(line.substr(0, of_root.size() - 1), of_root.data());
  return line;
}

// Fails if damage is found by one rank alone, or another kind of error than a line comes of it.
TEST(EngineCheckpoint, BadInputIsOneLineThatIsTheSameOnEveryRank) {
  namespace fs = std::filesystem;
  const Toy toy;
  const SharedFolder folder;
  Engine engine(MPI_COMM_WORLD, toy.model, momentum_config());
  for (int step = 1; step <= 2; ++step) {
    one_sample_step(engine, toy, 1);
    engine.save(folder.in("run"));
  }
  const auto state = whole_state(engine);
  const fs::path newest = fs::path(folder.in("run")) / checkpoint::step_name(2);
  std::vector<std::string> pieces;  // of step 1, then of step 2
  for (int step = 1; step <= 2; ++step) {
    pieces.push_back(
        checkpoint::Checkpoint::open(checkpoint::SystemCalls::native(),
                                     fs::path(folder.in("run")) / checkpoint::step_name(step))
            .commit()
            .files[1]
            .name);
  }
  MPI_Barrier(MPI_COMM_WORLD);
  // Makes a directory of step 2 alone, which `damage` changes on rank 0.
  const auto damaged = [&](const std::string& name, auto&& damage) {
    const fs::path step = fs::path(folder.in(name)) / checkpoint::step_name(2);
    if (job_rank() == 0) {
      fs::create_directories(step);
      for (const auto& entry : fs::directory_iterator(newest)) {
        fs::copy_file(entry.path(), step / entry.path().filename());
      }
      damage(step);
    }
    MPI_Barrier(MPI_COMM_WORLD);
    return folder.in(name);
  };
  constexpr auto over = fs::copy_options::overwrite_existing;
  const auto expect_line = [&](const std::string& directory, const std::vector<std::string>& parts,
                               std::optional<std::int64_t> step = {}) {
    const std::string line = line_of_load(engine, directory, step);
    for (const std::string& part : parts) {
      EXPECT_NE(line.find(part), std::string::npos) << "no \"" << part << "\" in: " << line;
    }
  };

  expect_line(newest.string(), {"expected a directory of steps, found one step"});
  expect_line((newest / "manifest.h5").string(), {"manifest.h5", "Not a directory"});
  expect_line(folder.in("run"), {"step-000000009", "No such file"}, 9);
  expect_line(damaged("foreign_manifest",
                      [&](const fs::path& step) {
                        fs::copy_file(newest / pieces[1], step / "manifest.h5", over);
                      }),
              {"manifest.h5", "bytes"});
  expect_line(damaged("foreign_piece",
                      [&](const fs::path& step) {
                        fs::copy_file(newest / "manifest.h5", step / pieces[1], over);
                      }),
              {pieces[1], "bytes", "damaged or another's"});
  expect_line(damaged("no_commit", [](const fs::path& step) { fs::remove(step / "COMMIT"); }),
              {"COMMIT", "No such file"});
  expect_line(
      damaged("text", [](const fs::path& step) { std::ofstream(step / "COMMIT") << "a text\n"; }),
      {"COMMIT", "no checkpoint of mics"});
  expect_line(damaged("later",
                      [](const fs::path& step) {
                        std::ofstream(step / "COMMIT") << "mics-checkpoint 7\nwriter mics 3.1.0\n";
                      }),
              {"expected format version 1, found 7", "mics 3.1.0 wrote it"});
  EXPECT_EQ(whole_state(engine), state) << "changed before anything was verified";
  const fs::path other = fs::path(folder.in("run")) / checkpoint::step_name(1) / pieces[0];
  expect_line(damaged("other_step",
                      [&](const fs::path& step) { fs::copy_file(other, step / pieces[1], over); }),
              {"MiB 0 of " + pieces[1], "CRC-32C", "damaged or another's"});
  EXPECT_EQ(line_of_load(engine, folder.in("run")), "");
  EXPECT_EQ(whole_state(engine), state);
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
    float* const first = const_cast<float*>(lease.view<const float*>(toy.bias[2]).data());
    const float broken = host_view<const float*>(lease, toy.bias[2])(0) + 1;
    const Execution exec;
    device::copy(exec, first, &broken, sizeof(broken));
    exec.fence("the memory is broken");
  }

  expect_error<FormatError>([&] { engine.save(folder.in("run")); }, {"replica", "rank"});
  EXPECT_TRUE(checkpoint::list_steps(folder.in("run")).empty());
}

}  // namespace
}  // namespace mics::test
