// SPDX-License-Identifier: Apache-2.0
#include "transport_fixture.hpp"
#include <mics/base/error.hpp>
#include <mics/comm/agreement.hpp>

#include <gtest/gtest.h>
#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace mics::comm::test {
namespace {

/// Has the ranks in `failing` throw; all must end with the text of the lowest.
template <class Thrown, class Expected = Thrown>
void expect_all_throw(const std::set<int>& failing) {
  const std::string expected = "rank " + std::to_string(*failing.begin()) + " found no file";
  const auto action = [&] {
    if (failing.contains(job_rank())) {
      throw Thrown("rank " + std::to_string(job_rank()) + " found no file");
    }
  };
  const auto expect = [&](const auto& call) {
    try {
      call();
      ADD_FAILURE() << "rank " << job_rank() << " went on";
    } catch (const Expected& error) {
      EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
    } catch (const std::exception& error) {
      ADD_FAILURE() << "another class: " << error.what();
    }
  };
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  expect([&] { agree(comm, action); });
  World world;
  expect([&] { agree(world.transport, "a test", action); });
  expect([&] { agree_patiently(world.transport, "a test", action); });
}

TEST(Agree, LetsEveryoneGoOnWhereNobodyThrows) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  int runs = 0;

  EXPECT_NO_THROW(agree(comm, [&] { ++runs; }));

  EXPECT_EQ(runs, 1);
}

TEST(Agree, ThrowsTheErrorOfEachPossibleRankOnAll) {
  for (int rank = 0; rank < job_size(); ++rank) expect_all_throw<ConfigError>({rank});
}

TEST(Agree, KeepsTheClass) {
  const int last = job_size() - 1;

  expect_all_throw<ArgumentError>({last});
  expect_all_throw<ConfigError>({last});
  expect_all_throw<StateError>({last});
  expect_all_throw<CommError>({last});
  expect_all_throw<Error>({last});
}

TEST(Agree, CarriesExceptionsOfOthersToo) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);

  try {
    agree(comm, [] {
      if (job_rank() == job_size() - 1) throw std::invalid_argument("no such cell");
    });
    ADD_FAILURE() << "no error";
  } catch (const std::exception& error) {
    EXPECT_NE(std::string(error.what()).find("no such cell"), std::string::npos) << error.what();
  }
}

TEST(Agree, TakesTheLowestOfSeveral) {
  std::set<int> failing;
  for (int rank = job_size() / 2; rank < job_size(); ++rank) failing.insert(rank);

  expect_all_throw<StateError>(failing);
}

TEST(Agree, CarriesALongText) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  const std::string text(100'000, 'x');

  try {
    agree(comm, [&] {
      if (job_rank() == job_size() - 1) throw ConfigError(text + "end");
    });
    ADD_FAILURE() << "no error";
  } catch (const ConfigError& error) {
    EXPECT_EQ(std::string(error.what()).size(), text.size() + 3);
  }
}

TEST(Agree, CanBeUsedAgainAfterAFailure) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);

  EXPECT_THROW(agree(comm, [] { throw StateError("everyone"); }), StateError);
  EXPECT_NO_THROW(agree(comm, [] {}));

  World world;
  EXPECT_THROW(agree(world.transport, "a test", [] { throw StateError("everyone"); }), StateError);
  EXPECT_NO_THROW(agree(world.transport, "a test", [] {}));
}

// Fails if ranks wait for a slow one inside a single collective.
TEST(AgreePatiently, WaitsLongerThanTheTransportsLimit) {
  World world(std::vector<int>(static_cast<std::size_t>(job_size()), 0),
              std::chrono::milliseconds(400));
  for (int slow = 0; slow < job_size(); slow += std::max(1, job_size() - 1)) {
    std::thread::id thread;
    EXPECT_NO_THROW(agree_patiently(world.transport, "a slow disk", [&] {
      thread = std::this_thread::get_id();
      if (job_rank() == slow) std::this_thread::sleep_for(std::chrono::milliseconds(1500));
    }));
    EXPECT_NE(thread, std::this_thread::get_id());
  }
}

// Fails if an agreement is a call of MPI that cannot be given up.
TEST(Agree, EndsWhereARankDoesNotCome) {
  if (job_size() == 1) return;  // nobody to miss
  for (const bool patiently : {false, true}) {
    // Long enough for the ranks that do come on a busy machine: another one would be blamed.
    World world(std::vector<int>(static_cast<std::size_t>(job_size()), 0),
                std::chrono::milliseconds(1000));
    const int absent = job_size() - 1;
    if (job_rank() != absent) {
      try {
        if (patiently) {
          agree_patiently(world.transport, "a test", [] {});
        } else {
          agree(world.transport, "a test", [] {});
        }
        ADD_FAILURE() << "rank " << job_rank() << " went on";
      } catch (const CommError& error) {
        EXPECT_NE(std::string(error.what()).find("rank " + std::to_string(absent)),
                  std::string::npos)
            << error.what();
      }
    }
    MPI_Barrier(MPI_COMM_WORLD);
    // On the absent rank too: freeing the communicators would wait for the others.
    world.failures.fail("end of the test");
  }
}

// Fails if a rank that ends its engine over the error hides the error from slower ranks.
TEST(Agree, EveryRankThrowsTheErrorWhateverTheFirstDoesThen) {
  for (int round = 0; round < 40; ++round) {
    World world;
    try {
      agree(world.transport, "a test", [&] {
        if (job_rank() == round % job_size()) throw StateError("the disk is full");
      });
      ADD_FAILURE() << "no error";
    } catch (const StateError& error) {
      EXPECT_STREQ(error.what(), "the disk is full");
    } catch (const CommError& error) {
      ADD_FAILURE() << "round " << round << ": " << error.what();
    }
    world.failures.fail("an exception ended the engine");
  }
}

TEST(HelperThread, HasItsSignalsBlocked) {
  const auto blocked = [] {
    sigset_t signals;
    pthread_sigmask(SIG_BLOCK, nullptr, &signals);
    return sigismember(&signals, SIGXFSZ) == 1 && sigismember(&signals, SIGTERM) == 1 &&
           sigismember(&signals, SIGSEGV) == 0;
  };
  EXPECT_TRUE(on_helper_thread(blocked).get());
  EXPECT_FALSE(blocked());
}

TEST(AllOf, IsTrueOnlyIfItIsOnAllRanks) {
  World world;
  EXPECT_TRUE(all_of(world.transport, true, "a test"));
  for (int rank = 0; rank < job_size(); ++rank) {
    EXPECT_FALSE(all_of(world.transport, job_rank() != rank, "a test"));
  }
}

TEST(Broadcast, CarriesAnyNumberOfBytes) {
  World world;
  for (const std::size_t size : {std::size_t{0}, std::size_t{1}, std::size_t{300'000}}) {
    for (int root = 0; root < job_size(); ++root) {
      std::vector<std::byte> bytes(job_rank() == root ? size : 3, std::byte{9});
      if (job_rank() == root && size > 0) bytes.back() = static_cast<std::byte>(root);
      broadcast(world.transport, bytes, root, "a test");
      std::vector<std::byte> expected(size, std::byte{9});
      if (size > 0) expected.back() = static_cast<std::byte>(root);
      EXPECT_EQ(bytes, expected);
    }
  }
}

TEST(Gather, BringsWhatEachRankHasToTheRoot) {
  World world;
  const auto bytes_of = [](int rank) {
    return std::vector<std::byte>(static_cast<std::size_t>(rank * 40'000), std::byte(rank));
  };
  for (int root = 0; root < job_size(); ++root) {
    const auto all = world.transport.gather(bytes_of(job_rank()), root, operation);
    if (job_rank() != root) {
      EXPECT_TRUE(all.empty());
      continue;
    }
    ASSERT_EQ(all.size(), static_cast<std::size_t>(job_size()));
    for (int rank = 0; rank < job_size(); ++rank) {
      EXPECT_EQ(all[static_cast<std::size_t>(rank)], bytes_of(rank));
    }
  }
}

TEST(RequireSame, AcceptsTheSameBytes) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);

  EXPECT_NO_THROW(require_same(comm, "", "nothing"));
  EXPECT_NO_THROW(require_same(comm, std::string("a\0b", 3), "bytes"));
  EXPECT_NO_THROW(require_same(comm, std::string(300'000, 'q'), "a long text"));
  World world;
  EXPECT_NO_THROW(require_same(world.transport, "", "nothing"));
  EXPECT_NO_THROW(require_same(world.transport, std::string(300'000, 'q'), "a long text"));
}

TEST(RequireSame, NamesTheFirstRankThatDiffers) {
  if (job_size() == 1) return;  // nobody to differ from
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  World world;
  for (int odd = 1; odd < job_size(); ++odd) {
    std::string bytes(5000, 'a');
    if (job_rank() >= odd) bytes.back() = 'b';
    EXPECT_THROW(require_same(world.transport, bytes, "the deck"), ArgumentError);
    try {
      require_same(comm, bytes, "the deck");
      ADD_FAILURE() << "rank " << job_rank() << " went on";
    } catch (const ArgumentError& error) {
      EXPECT_NE(std::string(error.what()).find("the deck"), std::string::npos) << error.what();
      EXPECT_NE(std::string(error.what()).find("rank " + std::to_string(odd)), std::string::npos)
          << error.what();
    }
  }
}

TEST(RequireSame, SeesADifferenceInLengthAndInRankZero) {
  if (job_size() == 1) return;  // nobody to differ from
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);

  EXPECT_THROW(require_same(comm, job_rank() == job_size() - 1 ? "ab" : "a", "text"),
               ArgumentError);
  EXPECT_THROW(require_same(comm, job_rank() == 0 ? "" : "a", "text"), ArgumentError);
}

}  // namespace
}  // namespace mics::comm::test
