// SPDX-License-Identifier: Apache-2.0
#include "transport_fixture.hpp"
#include <mics/base/error.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <chrono>
#include <functional>
#include <list>
#include <string>
#include <thread>
#include <vector>

namespace mics::comm::test {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Keeps ranks together between the phases of a test, apart from what is tested.
void meet() { MPI_Barrier(MPI_COMM_WORLD); }

/// Every way to wait in a transport.
struct Wait {
  const char* name;
  std::function<void(Transport&)> enter;
};
const std::vector<Wait>& waits() {
  static std::vector<std::byte> a(1 << 20), b(static_cast<std::size_t>(job_size()) << 17);
  static const std::vector<Wait> all{
      {"all_gather", [](Transport& t) { t.all_gather(a.data(), b.data(), 1000, operation, {}); }},
      {"all_gather of 128 KiB",
       [](Transport& t) { t.all_gather(a.data(), b.data(), 1 << 17, operation, {}); }},
      {"reduce_scatter",
       [](Transport& t) {
         t.reduce_scatter(a.data(), DType::fp32, b.data(), DType::fp32, 100, SumMode::add,
                          operation, {});
       }},
      {"all_reduce",
       [](Transport& t) { t.all_reduce(a.data(), DType::fp64, 1000, operation, {}); }},
      {"all_gather_small",
       [](Transport& t) { t.all_gather_small(a.data(), b.data(), 8, operation); }},
      {"barrier", [](Transport& t) { t.barrier(operation); }},
  };
  return all;
}

TEST(Failure, EndsTheWaitOfTheOthersWithItsText) {
  if (job_size() == 1) return;  // nobody waits
  const int failing = job_size() - 1;
  for (const Nodes& nodes : node_patterns()) {
    for (const Wait& wait : waits()) {
      SCOPED_TRACE(std::string(wait.name) + ", " + nodes.name);
      World world(nodes.label);
      const auto start = Clock::now();

      if (job_rank() == failing) {
        world.failures.fail("the disk of this rank is full");
      } else {
        try {
          wait.enter(world.transport);
          ADD_FAILURE() << "no error";
        } catch (const CommError& error) {
          EXPECT_NE(std::string(error.what()).find("the disk of this rank is full"),
                    std::string::npos)
              << error.what();
          EXPECT_NE(std::string(error.what()).find("rank " + std::to_string(failing)),
                    std::string::npos)
              << error.what();
        }
      }

      EXPECT_LT(seconds_since(start), 5);
      EXPECT_TRUE(world.failures.failed());
      EXPECT_EQ(world.failures.failed_rank(), failing);
      meet();
    }
  }
}

TEST(Failure, StaysAndIsThrownByEveryLaterCall) {
  if (job_size() == 1) return;  // nobody waits
  World world;

  if (job_rank() == 0) world.failures.fail("first text");
  meet();
  const auto start = Clock::now();
  while (!world.failures.failed() && seconds_since(start) < 5) {
    try {
      world.failures.poll();
    } catch (const CommError&) {
    }
  }
  world.failures.fail("a later text");

  EXPECT_THROW(world.failures.poll(), CommError);
  EXPECT_THROW(world.transport.barrier(operation), CommError);
  EXPECT_NE(world.failures.text().find("first text"), std::string::npos) << world.failures.text();
  EXPECT_EQ(world.failures.text().find("a later text"), std::string::npos) << world.failures.text();
  EXPECT_EQ(world.failures.failed_rank(), 0);
  meet();
}

TEST(Failure, WaitsForTheBetterTextThatFollows) {
  if (job_size() == 1) return;  // nobody waits
  World world;

  if (job_rank() == 0) {
    world.failures.fail("a scope ended", true);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    world.failures.fail("negative temperature in cell 7");
  } else {
    try {
      world.transport.barrier(operation);
      ADD_FAILURE() << "no error";
    } catch (const CommError& error) {
      EXPECT_NE(std::string(error.what()).find("negative temperature in cell 7"), std::string::npos)
          << error.what();
    }
  }
  meet();
}

TEST(Failure, DoesNotWaitForeverForATextThatNeverFollows) {
  if (job_size() == 1) return;  // nobody waits
  World world;
  const auto start = Clock::now();

  if (job_rank() == 0) {
    world.failures.fail("a scope ended", true);
  } else {
    try {
      world.transport.barrier(operation);
      ADD_FAILURE() << "no error";
    } catch (const CommError& error) {
      EXPECT_NE(std::string(error.what()).find("a scope ended"), std::string::npos) << error.what();
    }
  }

  EXPECT_LT(seconds_since(start), 10);
  meet();
}

TEST(Failure, NobodyHasFailedAtTheStart) {
  World world;

  EXPECT_NO_THROW(world.failures.poll());
  EXPECT_FALSE(world.failures.failed());
  EXPECT_EQ(world.failures.failed_rank(), -1);
  EXPECT_TRUE(world.failures.text().empty());
}

TEST(Timeout, NamesTheRanksThatDidNotCome) {
  if (job_size() == 1) return;  // nobody waits
  const int missing = job_size() - 1;
  for (const Wait& wait : waits()) {
    SCOPED_TRACE(wait.name);
    World world(node_patterns()[0].label, std::chrono::milliseconds(200));
    const auto start = Clock::now();

    if (job_rank() != missing) {
      try {
        wait.enter(world.transport);
        ADD_FAILURE() << "no error";
      } catch (const CommError& error) {
        // A rank that waits for others than the missing one may learn of it from them.
        const std::string text = error.what();
        if (std::string(wait.name) != "all_gather_small" && std::string(wait.name) != "barrier") {
          EXPECT_NE(text.find(std::to_string(missing)), std::string::npos) << text;
        }
      }
      EXPECT_GE(seconds_since(start), 0.15);
      EXPECT_LT(seconds_since(start), 10);
    }
    meet();
  }
}

TEST(SizeMismatch, IsAnErrorOnEveryRank) {
  if (job_size() == 1) return;  // nobody to differ from
  for (const Nodes& nodes : node_patterns()) {
    for (const std::int64_t other : {100, 70'000}) {
      for (const int odd : {0, job_size() - 1}) {
        SCOPED_TRACE(std::string(nodes.name) + ", " + std::to_string(other) + " bytes on rank " +
                     std::to_string(odd));
        World world(nodes.label, std::chrono::seconds(2));
        const std::int64_t bytes = job_rank() == odd ? other : 5000;
        // After an error messages may still be under way: their memory stays.
        static std::list<std::vector<std::byte>> kept;
        auto& send = kept.emplace_back(static_cast<std::size_t>(bytes));
        // FIXME_OPENMPI(5.0.7): over shared memory a message of more than 4 KiB is written whole,
        // past the end of a shorter receive that then fails; room for it everywhere, remove when
        // the end of the receive is respected.
        auto& receive = kept.emplace_back(static_cast<std::size_t>(70'000 * (job_size() + 1)));

        // As the engine does: a rank that finds an error tells the others.
        EXPECT_THROW(
            {
              try {
                world.transport.all_gather(send.data(), receive.data(), bytes, operation, {});
              } catch (const std::exception& error) {
                world.failures.fail(error.what());
                throw;
              }
            },
            CommError);
        meet();
      }
    }
  }
}

}  // namespace
}  // namespace mics::comm::test
