// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>
#include <mpi.h>
#include <program/last_words.hpp>

#include <chrono>
#include <optional>
#include <string>

namespace {

using mics::apps::LastWords;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

class LastWordsTest : public testing::Test {
 protected:
  LastWordsTest() {
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
  }

  /// How many ranks print.
  static int sum(bool prints) {
    int count = prints ? 1 : 0;
    MPI_Allreduce(MPI_IN_PLACE, &count, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
    return count;
  }

  int rank = 0;
  int size = 1;
};

TEST_F(LastWordsTest, OfRanksWithTheSameErrorTheLowestPrints) {
  LastWords words(MPI_COMM_WORLD);

  const bool prints = words.should_print("the same on all ranks", milliseconds(20000));
  words.wait_for_others(milliseconds(20000));

  EXPECT_EQ(prints, rank == 0);
}

TEST_F(LastWordsTest, DifferentErrorsAreAllPrinted) {
  LastWords words(MPI_COMM_WORLD);

  const bool prints = words.should_print("error " + std::to_string(rank / 2), milliseconds(20000));
  words.wait_for_others(milliseconds(20000));

  EXPECT_EQ(prints, rank % 2 == 0);
}

TEST_F(LastWordsTest, RanksThatOnlyHeardDelayNobody) {
  LastWords words(MPI_COMM_WORLD);
  const auto start = Clock::now();

  bool prints = false;
  if (rank == size - 1) {
    prints = words.should_print("of the last rank", milliseconds(20000));
  } else {
    words.heard();
  }
  words.wait_for_others(milliseconds(20000));

  EXPECT_EQ(prints, rank == size - 1);
  EXPECT_LT(Clock::now() - start, milliseconds(10000));
}

TEST_F(LastWordsTest, ARankThatSaysNothingDelaysForTheLimitOnly) {
  LastWords words(MPI_COMM_WORLD);
  bool prints = false;
  if (rank > 0 || size == 1) {
    const auto start = Clock::now();
    prints = words.should_print("the same on all others", milliseconds(300));
    words.wait_for_others(milliseconds(300));
    EXPECT_LT(Clock::now() - start, milliseconds(10000));
  }

  EXPECT_GE(sum(prints), 1);
  // The last message: the communicator of a rank that said nothing is freed together.
  words.heard();
}

TEST_F(LastWordsTest, WithoutLastWordsNothingIsLeftOver) {
  std::optional<LastWords> words(MPI_COMM_WORLD);

  words.reset();

  EXPECT_EQ(sum(true), size);
}

}  // namespace
