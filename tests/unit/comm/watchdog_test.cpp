// SPDX-License-Identifier: Apache-2.0
// The only thread that mics starts. The same tests run under the thread sanitizer, where they are
// built alone with the watchdog: no MPI and no Kokkos here.
#include <mics/comm/watchdog.hpp>

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace mics::comm {
namespace {

using std::chrono::milliseconds;

/// Lines from the watchdog's thread.
struct Lines {
  std::mutex mutex;
  std::vector<std::string> lines;

  [[nodiscard]] auto sink() {
    return [this](const std::string& line) {
      const std::lock_guard lock(mutex);
      lines.push_back(line);
    };
  }
  [[nodiscard]] std::size_t count() {
    const std::lock_guard lock(mutex);
    return lines.size();
  }
  [[nodiscard]] bool arrive(std::size_t expected) {
    for (int i = 0; i < 2000 && count() < expected; ++i) {
      std::this_thread::sleep_for(milliseconds(5));
    }
    return count() >= expected;
  }
};

TEST(WatchdogTest, SaysOnceWhatIsStuckAndGoesOnWaiting) {
  Lines told;
  {
    Watchdog dog("construction of the engine on rank 3", milliseconds(20), told.sink());
    ASSERT_TRUE(told.arrive(1));
    std::this_thread::sleep_for(milliseconds(60));
  }

  ASSERT_EQ(told.count(), 1U);
  for (const char* part : {"construction of the engine on rank 3", "within 20 ms"}) {
    EXPECT_NE(told.lines[0].find(part), std::string::npos) << told.lines[0];
  }
}

TEST(WatchdogTest, NamesTheStage) {
  Lines told;
  Watchdog dog("destruction", milliseconds(200), told.sink());

  dog.stage("the split of the shard groups");

  ASSERT_TRUE(told.arrive(1));
  EXPECT_NE(told.lines[0].find("a wait in the split of the shard groups"), std::string::npos)
      << told.lines[0];
}

TEST(WatchdogTest, IsSilentAboutWhatEndsInTime) {
  Lines told;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < 200; ++i) Watchdog("a stretch", milliseconds(60'000), told.sink());

  EXPECT_EQ(told.count(), 0U);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20))
      << "an end waits for the time limit";
}

TEST(WatchdogTest, WithoutASinkStartsNothing) {
  Watchdog dog("a stretch", milliseconds(1), nullptr);
  dog.stage("anything");
  std::this_thread::sleep_for(milliseconds(20));
}

TEST(WatchdogTest, EndsWhileTheLineIsTold) {
  std::atomic<bool> begun{false};
  std::atomic<bool> told{false};
  {
    Watchdog dog("a stretch", milliseconds(1), [&](const std::string& /*line*/) {
      begun = true;
      std::this_thread::sleep_for(milliseconds(50));
      told = true;
    });
    while (!begun) std::this_thread::yield();
  }
  EXPECT_TRUE(told) << "the sink may use what the caller destroys next";
}

TEST(WatchdogTest, EndRacesWithTheLimit) {
  Lines told;
  for (int i = 0; i < 300; ++i) {
    auto dog = std::make_unique<Watchdog>("a stretch", milliseconds(1), told.sink());
    dog->stage("stage " + std::to_string(i));
    std::this_thread::sleep_for(std::chrono::microseconds(900 + i));
    dog.reset();
  }
  EXPECT_LE(told.count(), 300U);
}

}  // namespace
}  // namespace mics::comm
