// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <mpi.h>

#include <array>
#include <cstdio>
#include <string>
#include <vector>

namespace mics::test {

/// Makes the ranks of a test program agree on the outcome of each test.
///
/// GoogleTest's own printer stays on rank 0 only; the failures of other ranks appear as
/// `[rank 2] FAILURE file:line message`. A test that fails on one rank fails on all of them.
///
/// The collective is in OnTestEnd because every rank reaches it. It could not be in
/// OnTestPartResult, which only the failing rank reaches. A rank that leaves a test early while
/// others wait for it is the watchdog's case.
class RankListener : public testing::EmptyTestEventListener {
 public:
  /// Collective over `parent`.
  explicit RankListener(MPI_Comm parent) {
    MPI_Comm_dup(parent, &comm_);  // apart from the messages of the tests
    MPI_Comm_rank(comm_, &rank_);
  }
  ~RankListener() override { MPI_Comm_free(&comm_); }
  RankListener(const RankListener&) = delete;
  RankListener& operator=(const RankListener&) = delete;

  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (rank_ == 0 || agreeing_ || !result.failed()) return;
    std::fprintf(stderr, "[rank %d] FAILURE %s:%d %s\n", rank_,
                 result.file_name() != nullptr ? result.file_name() : "unknown file",
                 result.line_number(), result.message());
  }

  /// Collective over all ranks.
  void OnTestEnd(const testing::TestInfo& test) override {
    const bool failed_here = test.result()->Failed();
    std::array<int, 2> outcome{failed_here, test.result()->Skipped()};
    MPI_Allreduce(MPI_IN_PLACE, outcome.data(), 2, MPI_INT, MPI_MAX, comm_);
    const auto [failed, skipped] = outcome;
    // GoogleTest still counts a failure that is added here as one of the test that ends, and ends
    // listeners in reverse order, so that its printer sees it.
    agreeing_ = true;
    if (failed != 0 && !failed_here) ADD_FAILURE() << "failed on another rank";
    agreeing_ = false;
    if (failed == 0 && skipped != 0) {
      skipped_.push_back(std::string(test.test_suite_name()) + "." + test.name());
    }
  }

  /// Tests that were skipped on at least one rank and failed on none; same on all ranks.
  [[nodiscard]] const std::vector<std::string>& skipped() const noexcept { return skipped_; }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  bool agreeing_ = false;  // a failure that comes now is another rank's, and that rank printed it
  std::vector<std::string> skipped_;
};

}  // namespace mics::test
