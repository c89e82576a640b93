// SPDX-License-Identifier: Apache-2.0
// One rank cannot go on: all end with its message, soon, and the application lives.
#include "toy.hpp"
#include <mics/mics.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

namespace mics::test {
namespace {

using Clock = std::chrono::steady_clock;

// Over NCCL an engine takes a second to make and to end. There a rank may wait for its own copies,
// which are behind a collective, and hears of a failure when the time limit ends them.
constexpr double time_limit = device::separate ? 3 : 20;
constexpr double soon = device::separate ? 15 : 6;  // seconds

/// The application goes on: the ranks meet and train with a new engine on a new communicator.
void expect_new_engine_trains() {
  MPI_Comm fresh = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &fresh);
  {
    const Toy toy;
    Engine engine(fresh, toy.model, toy_config());
    EXPECT_FALSE(toy_step(engine, toy, 1).skipped);
    EXPECT_EQ(values_of(engine, toy.bias[0])[0], toy.initial(toy.bias[0], 0) - 1);
  }
  MPI_Comm_free(&fresh);
}

/// Trains with an accident on rank `failing`, in step `step`. All ranks must end within seconds;
/// the others with a CommError that holds `text`.
void expect_failure(int failing, const std::function<void(Engine&, const Toy&, int)>& train,
                    const std::string& text) {
  const auto start = Clock::now();
  {
    const Toy toy;
    Config config = toy_config();
    if (job_size() % 2 == 0) config.preset = Preset::mics, config.shard_size = job_size() / 2;
    config.timeout = time_limit;
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    try {
      for (int step = 0; step < 100; ++step) train(engine, toy, step);
      ADD_FAILURE() << "no error";
    } catch (const CommError& error) {
      EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << error.what();
      if (job_rank() != failing) {
        EXPECT_NE(std::string(error.what()).find("rank " + std::to_string(failing)),
                  std::string::npos)
            << error.what();
      }
    } catch (const std::exception& error) {
      EXPECT_EQ(job_rank(), failing) << error.what();
    }
    EXPECT_LT(std::chrono::duration<double>(Clock::now() - start).count(), soon);
    EXPECT_FALSE(engine.alive());
    EXPECT_EQ(engine.failed_rank(), failing);
    EXPECT_THROW(engine.begin_micro_step({.samples = 1, .last = true}), CommError);
    EXPECT_THROW((void)engine.gather(toy.units[0]), CommError);
    EXPECT_THROW(engine.step(), CommError);
  }
  MPI_Barrier(MPI_COMM_WORLD);
  expect_new_engine_trains();
}

struct Accident : std::runtime_error {
  Accident() : std::runtime_error("negative density in cell 4711") {}
};

void train_with_accident(Engine& engine, const Toy& toy, bool accident) {
  engine.begin_micro_step({.samples = 1, .last = true});
  for (const UnitId unit : toy.units) (void)engine.gather(unit);
  for (std::size_t u = 4; u-- > 0;) {
    const Lease lease = engine.gather(toy.units[u]);
    auto scope = engine.gradient(toy.units[u]);
    add_constant(toy, scope, u, 1);
    if (accident && u == 1) throw Accident();
    scope.reduce();
  }
  (void)engine.step();
}

TEST(FailureTest, ExceptionBetweenGatherAndReduceUnderGuardReachesAllWithItsText) {
  if (job_size() == 1) return;  // nobody to tell
  for (const int failing : {0, job_size() - 1}) {
    SCOPED_TRACE("rank " + std::to_string(failing) + " fails");
    expect_failure(
        failing,
        [&](Engine& engine, const Toy& toy, int step) {
          engine.guard(
              [&] { train_with_accident(engine, toy, step == 2 && job_rank() == failing); });
        },
        "negative density in cell 4711");
  }
}

TEST(FailureTest, ExceptionWithoutGuardEndsTheOthersToo) {
  if (job_size() == 1) return;  // nobody to tell
  const int failing = job_size() - 1;
  expect_failure(
      failing,
      [&](Engine& engine, const Toy& toy, int step) {
        train_with_accident(engine, toy, step == 1 && job_rank() == failing);
      },
      "\"b\"");
}

TEST(FailureTest, ExceptionInTheFirstStepBeforeAnyOrderIsKnown) {
  if (job_size() == 1) return;  // nobody to tell
  const int failing = 0;
  expect_failure(
      failing,
      [&](Engine& engine, const Toy& toy, int step) {
        engine.guard([&] { train_with_accident(engine, toy, step == 0 && job_rank() == failing); });
      },
      "negative density in cell 4711");
}

TEST(FailureTest, ForgottenReduceIsReportedWithTheUnit) {
  if (job_size() == 1) return;  // nobody to tell
  const int failing = job_size() - 1;
  expect_failure(
      failing,
      [&](Engine& engine, const Toy& toy, int step) {
        engine.begin_micro_step({.samples = 1, .last = true});
        for (std::size_t u = 0; u < 4; ++u) {
          auto scope = engine.gradient(toy.units[u]);
          if (step == 1 && u == 2 && job_rank() == failing) continue;
          scope.reduce();
        }
        (void)engine.step();
      },
      "\"c\"");
}

TEST(FailureTest, FailTellsTheOthersTheGivenText) {
  if (job_size() == 1) return;  // nobody to tell
  const int failing = job_size() / 2;
  expect_failure(
      failing,
      [&](Engine& engine, const Toy& toy, int step) {
        if (step == 2 && job_rank() == failing) {
          engine.fail("the file system is full");
          throw std::runtime_error("ends here");
        }
        (void)toy_step(engine, toy, 1);
      },
      "the file system is full");
}

TEST(FailureTest, RankThatNeverComesIsNamedAfterTheTimeLimit) {
  if (job_size() == 1) return;  // nobody to wait for
  const auto start = Clock::now();
  {
    const Toy toy;
    Config config = toy_config();
    config.timeout = 1;
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    (void)toy_step(engine, toy, 1);
    if (job_rank() != job_size() - 1) {
      expect_error<CommError>(
          [&] {
            for (int i = 0; i < 5; ++i) (void)toy_step(engine, toy, 1);
          },
          {std::to_string(job_size() - 1)});
    } else {
      // Learns of it when it comes back.
      while (std::chrono::duration<double>(Clock::now() - start).count() < 3) {
      }
      EXPECT_THROW((void)toy_step(engine, toy, 1), CommError);
    }
  }
  EXPECT_LT(std::chrono::duration<double>(Clock::now() - start).count(), soon + 4);
  MPI_Barrier(MPI_COMM_WORLD);
  expect_new_engine_trains();
}

TEST(FailureTest, DebugNamesRanksThatOpenDifferentUnits) {
  if (job_size() == 1) return;  // nobody to differ from
  {
    const Toy toy;
    Config config = toy_config();
    config.debug = true;
    config.timeout = 5;
    Engine engine(MPI_COMM_WORLD, toy.model, config);
    engine.begin_micro_step({.samples = 1, .last = true});

    // Whoever speaks first names itself, the other rank, and both units.
    expect_error<CommError>([&] { (void)engine.gather(toy.units[job_rank() == 1 ? 2 : 0]); },
                            {"gather", "\"a\"", "\"c\"", "rank 1"});
    EXPECT_FALSE(engine.alive());
  }
  MPI_Barrier(MPI_COMM_WORLD);
  expect_new_engine_trains();
}

}  // namespace
}  // namespace mics::test
