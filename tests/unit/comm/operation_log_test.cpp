// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/operation_log.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <string>

namespace mics::comm {
namespace {

TEST(OperationLogTest, CountsByPurpose) {
  OperationLog log;

  log.record({Purpose::gather, "weights", 1});
  log.record({Purpose::hop2, "weights", 1});
  log.record({Purpose::gather, "biases", 1});

  EXPECT_EQ(log.count(Purpose::gather), 2);
  EXPECT_EQ(log.count(Purpose::hop2), 1);
  EXPECT_EQ(log.count(Purpose::hop1), 0);
  EXPECT_EQ(log.total(), 3);
}

TEST(OperationLogTest, ShowsTheNewestOldestFirstInOneLine) {
  OperationLog log;
  log.record({Purpose::gather, "weights", 1});
  log.record({Purpose::hop1, "biases", 1});
  log.record({Purpose::hop2, "table", 1});

  const std::string tail = log.tail(2);

  EXPECT_EQ(tail.find("weights"), std::string::npos) << tail;
  EXPECT_LT(tail.find("biases"), tail.find("table")) << tail;
  EXPECT_EQ(tail.find('\n'), std::string::npos) << tail;
  EXPECT_NE(tail.find("hop 1"), std::string::npos) << tail;
  EXPECT_EQ(OperationLog().tail(), "");
}

TEST(OperationLogTest, KeepsTheLast256) {
  OperationLog log;
  for (int i = 0; i < 300; ++i) log.record({Purpose::gather, i < 44 ? "old" : "new", 1});

  const std::string tail = log.tail();

  EXPECT_EQ(log.total(), 300);
  EXPECT_EQ(tail.find("old"), std::string::npos) << tail;
  EXPECT_EQ(std::ranges::count(tail, ','), 255);
}

}  // namespace
}  // namespace mics::comm
