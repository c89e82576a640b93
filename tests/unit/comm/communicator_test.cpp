// SPDX-License-Identifier: Apache-2.0
#include "transport_fixture.hpp"
#include <mics/base/error.hpp>
#include <mics/comm/communicator.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <string>
#include <type_traits>
#include <utility>

namespace mics::comm::test {
namespace {

/// Counts copies and frees of a communicator's duplicates through an attribute, which MPI copies
/// with MPI_Comm_dup and deletes with MPI_Comm_free.
class DuplicateCounter {
 public:
  /// Local.
  explicit DuplicateCounter(MPI_Comm comm) : comm_(comm) {
    MPI_Comm_create_keyval(copied, deleted, &key_, &counts_);
    MPI_Comm_set_attr(comm_, key_, this);
  }
  ~DuplicateCounter() {
    MPI_Comm_delete_attr(comm_, key_);
    MPI_Comm_free_keyval(&key_);
  }
  DuplicateCounter(const DuplicateCounter&) = delete;
  DuplicateCounter& operator=(const DuplicateCounter&) = delete;
  [[nodiscard]] int alive() const { return counts_.copied - counts_.deleted; }
  [[nodiscard]] int made() const { return counts_.copied; }

 private:
  struct Counts {
    int copied = 0;
    int deleted = 0;
  };
  static int copied(MPI_Comm, int, void* counts, void* value, void* out, int* flag) {
    ++static_cast<Counts*>(counts)->copied;
    *static_cast<void**>(out) = value;
    *flag = 1;
    return MPI_SUCCESS;
  }
  static int deleted(MPI_Comm, int, void*, void* counts) {
    ++static_cast<Counts*>(counts)->deleted;
    return MPI_SUCCESS;
  }
  MPI_Comm comm_;
  int key_ = MPI_KEYVAL_INVALID;
  Counts counts_;
};

MPI_Errhandler handler_of(MPI_Comm comm) {
  MPI_Errhandler handler = MPI_ERRHANDLER_NULL;
  MPI_Comm_get_errhandler(comm, &handler);
  return handler;
}

TEST(CommunicatorTest, DuplicateHasTheCallersRanksAndAContextOfItsOwn) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);

  int relation = MPI_UNEQUAL;
  MPI_Comm_compare(comm.native(), MPI_COMM_WORLD, &relation);
  EXPECT_EQ(relation, MPI_CONGRUENT);
  EXPECT_EQ(comm.rank(), job_rank());
  EXPECT_EQ(comm.size(), job_size());
}

TEST(CommunicatorTest, ErrorsReturnOnTheDuplicateAndTheCallersHandlerStays) {
  MPI_Comm callers = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &callers);
  MPI_Comm_set_errhandler(callers, MPI_ERRORS_ARE_FATAL);
  {
    const auto comm = Communicator::duplicate(callers);
    const auto part = comm.split(0, 0);
    const auto node = comm.split_by_node();

    EXPECT_EQ(handler_of(callers), MPI_ERRORS_ARE_FATAL);
    EXPECT_EQ(handler_of(comm.native()), MPI_ERRORS_RETURN);
    EXPECT_EQ(handler_of(part.native()), MPI_ERRORS_RETURN);
    EXPECT_EQ(handler_of(node.native()), MPI_ERRORS_RETURN);
  }
  EXPECT_EQ(handler_of(callers), MPI_ERRORS_ARE_FATAL);
  MPI_Comm_free(&callers);
}

TEST(CommunicatorTest, AnMpiErrorBecomesACommErrorWithItsText) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  int value = 0;

  try {
    check(MPI_Send(&value, 1, MPI_INT, comm.size() + 5, 0, comm.native()), "MPI_Send of a value");
    FAIL() << "no error";
  } catch (const CommError& error) {
    EXPECT_NE(std::string(error.what()).find("MPI_Send of a value"), std::string::npos)
        << error.what();
    EXPECT_NE(std::string(error.what()).find("MPI_ERR_RANK"), std::string::npos) << error.what();
  }
  EXPECT_NO_THROW(check(MPI_SUCCESS, "nothing"));
}

TEST(CommunicatorTest, SplitOrdersByKeyThenRank) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);
  const int color = job_rank() % 2;

  const auto backwards = comm.split(color, -job_rank());
  const auto alike = comm.split(color, 3);

  const int members = (job_size() + (color == 0 ? 1 : 0)) / 2;
  EXPECT_EQ(backwards.size(), members);
  EXPECT_EQ(backwards.rank(), members - 1 - job_rank() / 2);
  EXPECT_EQ(alike.rank(), job_rank() / 2);
}

TEST(CommunicatorTest, SplitByNodeHoldsRanksThatShareMemory) {
  const auto comm = Communicator::duplicate(MPI_COMM_WORLD);

  const auto node = comm.split_by_node();

  EXPECT_GE(node.size(), 1);
  EXPECT_LE(node.size(), comm.size());
  int ranks_of_all_nodes = node.rank() == 0 ? node.size() : 0;
  MPI_Allreduce(MPI_IN_PLACE, &ranks_of_all_nodes, 1, MPI_INT, MPI_SUM, MPI_COMM_WORLD);
  EXPECT_EQ(ranks_of_all_nodes, job_size());
}

TEST(CommunicatorTest, IsFreedOnceThroughMovesAndAssignments) {
  static_assert(!std::is_copy_constructible_v<Communicator>);
  static_assert(std::is_nothrow_move_constructible_v<Communicator>);
  MPI_Comm callers = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &callers);
  {
    const DuplicateCounter counter(callers);
    {
      auto first = Communicator::duplicate(callers);
      auto second = Communicator::duplicate(callers);
      EXPECT_EQ(counter.alive(), 2);

      auto third = std::move(first);
      EXPECT_EQ(first.native(), MPI_COMM_NULL);  // NOLINT: the moved-from state is what is tested
      EXPECT_EQ(counter.alive(), 2);
      third = std::move(second);
      EXPECT_EQ(counter.alive(), 1);
      EXPECT_EQ(third.size(), job_size());
      auto& same = third;
      third = std::move(same);
      EXPECT_EQ(counter.alive(), 1);
      EXPECT_NE(third.native(), MPI_COMM_NULL);
    }
    EXPECT_EQ(counter.alive(), 0);
    EXPECT_EQ(counter.made(), 2);
  }
  MPI_Comm_free(&callers);
}

TEST(CommunicatorTest, AbandonedOneIsNotFreed) {
  MPI_Comm callers = MPI_COMM_NULL;
  MPI_Comm_dup(MPI_COMM_WORLD, &callers);
  {
    const DuplicateCounter counter(callers);
    MPI_Comm kept = MPI_COMM_NULL;
    {
      auto comm = Communicator::duplicate(callers);
      kept = comm.native();
      comm.abandon();
      EXPECT_EQ(comm.native(), MPI_COMM_NULL);
    }
    EXPECT_EQ(counter.alive(), 1);
    MPI_Comm_free(&kept);
  }
  MPI_Comm_free(&callers);
}

TEST(CommunicatorTest, DefaultIsEmpty) {
  const Communicator comm;

  EXPECT_EQ(comm.native(), MPI_COMM_NULL);
  EXPECT_EQ(comm.rank(), 0);
  EXPECT_EQ(comm.size(), 1);
}

}  // namespace
}  // namespace mics::comm::test
