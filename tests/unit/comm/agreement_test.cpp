// SPDX-License-Identifier: Apache-2.0
#include "transport_fixture.hpp"
#include <mics/base/error.hpp>
#include <mics/comm/agreement.hpp>

#include <gtest/gtest.h>

#include <set>
#include <stdexcept>
#include <string>

namespace mics::comm::test {
namespace {

/// Has the ranks in `failing` throw; all must end with the text of the lowest.
template <class Thrown, class Expected = Thrown>
void expect_all_throw(const std::set<int>& failing) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  const std::string expected = "rank " + std::to_string(*failing.begin()) + " found no file";
  try {
    agree(comm, [&] {
      if (failing.contains(job_rank())) {
        throw Thrown("rank " + std::to_string(job_rank()) + " found no file");
      }
    });
    ADD_FAILURE() << "rank " << job_rank() << " went on";
  } catch (const Expected& error) {
    EXPECT_NE(std::string(error.what()).find(expected), std::string::npos) << error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another class: " << error.what();
  }
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
}

TEST(RequireSame, AcceptsTheSameBytes) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);

  EXPECT_NO_THROW(require_same(comm, "", "nothing"));
  EXPECT_NO_THROW(require_same(comm, std::string("a\0b", 3), "bytes"));
  EXPECT_NO_THROW(require_same(comm, std::string(300'000, 'q'), "a long text"));
}

TEST(RequireSame, NamesTheFirstRankThatDiffers) {
  if (job_size() == 1) return;  // nobody to differ from
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  for (int odd = 1; odd < job_size(); ++odd) {
    std::string bytes(5000, 'a');
    if (job_rank() >= odd) bytes.back() = 'b';
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
