// SPDX-License-Identifier: Apache-2.0
#include "transport_fixture.hpp"
#include <mics/base/error.hpp>
#include <mics/comm/device_watch.hpp>

#include <gtest/gtest.h>
#include <mpi.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <string>
#include <thread>

namespace mics::comm::test {
namespace {

using std::chrono::milliseconds;

constexpr Operation stuck{.purpose = Purpose::hop1, .object = "layer3", .bytes = 4096};

/// A pretended device with one communicator, whose operations start and end when the test says so.
struct Device {
  Communicator comm = Communicator::duplicate(MPI_COMM_WORLD);
  FailureChannel failures{comm};
  OperationLog log;
  std::atomic<bool> started = false;
  std::atomic<bool> finished = false;
  std::atomic<int> aborts = 0;
  std::string error;
  DeviceWatch watch;
  int member;

  explicit Device(milliseconds timeout)
      : watch(failures, log, timeout,
              [this](const Marker&, const Operation&, bool end) {
                return (end ? finished : started).load();
              }),
        member(watch.add({.ranks = all_ranks(),
                          .abort = [this] { ++aborts; },
                          .error = [this] { return error; }})) {}
  ~Device() { watch.remove(member); }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  void start() {
    log.record(stuck);
    watch.record(member, stuck, {Marker()}, {});
    started = true;
  }

  static std::vector<int> all_ranks() {
    std::vector<int> ranks;
    for (int rank = 0; rank < job_size(); ++rank) ranks.push_back(rank);
    return ranks;
  }
};

std::string text_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const CommError& error) {
    return error.what();
  }
  return {};
}

TEST(DeviceWatch, WaitsForTheEndOfTheWork) {
  Device device(std::chrono::seconds(60));
  device.start();
  const auto start = Clock::now();
  std::thread ends([&] {
    std::this_thread::sleep_for(milliseconds(50));
    device.finished = true;
  });

  EXPECT_NO_THROW(device.watch.wait({}));

  EXPECT_GE(seconds_since(start), 0.04);
  EXPECT_NO_THROW(device.watch.check());
  EXPECT_EQ(device.aborts, 0);
  ends.join();
  meet();
}

TEST(DeviceWatch, EndsAWaitForALateOperationAndNamesIt) {
  Device device(milliseconds(400));
  device.start();
  const auto start = Clock::now();

  const std::string text = text_of([&] { device.watch.wait({}); });

  EXPECT_NE(text.find("hop 1 of layer3 (4096 bytes) on rank "), std::string::npos) << text;
  EXPECT_NE(text.find("within 400 ms"), std::string::npos) << text;
  EXPECT_NE(text.find("last operations here: #0 hop 1 layer3"), std::string::npos) << text;
  EXPECT_GE(seconds_since(start), 0.25);
  EXPECT_LT(seconds_since(start), 5);
  EXPECT_GE(device.aborts, 1);
  EXPECT_FALSE(text_of([&] { device.watch.check(); }).empty());
  meet();
}

TEST(DeviceWatch, NamesTheRankThatDoesNotCome) {
  if (job_size() == 1) return;  // nobody is missing
  Device device(milliseconds(400));
  const int missing = job_size() - 1;

  if (job_rank() != missing) {
    device.start();
    const std::string text = text_of([&] { device.watch.wait({}); });
    EXPECT_NE(text.find("rank " + std::to_string(missing) + " is stopped, gone or busy"),
              std::string::npos)
        << text;
    for (int rank = 0; rank < missing && job_size() < 4; ++rank) {
      EXPECT_EQ(text.find("rank " + std::to_string(rank) + " is stopped"), std::string::npos)
          << text;
    }
  }
  meet();
}

// Fails if the time before the device could start an operation counts: an application's kernels
// may take as long as they like.
TEST(DeviceWatch, DoesNotCountTheTimeBehindOtherWork) {
  Device device(milliseconds(100));
  device.watch.record(device.member, stuck, {Marker()}, {});
  std::thread application([&] {
    std::this_thread::sleep_for(milliseconds(500));
    device.started = true;
    std::this_thread::sleep_for(milliseconds(20));
    device.finished = true;
  });

  EXPECT_EQ(text_of([&] { device.watch.wait({}); }), "");

  EXPECT_EQ(device.aborts, 0);
  application.join();
  meet();
}

TEST(DeviceWatch, ReleasesAnApplicationThatWaitsByItself) {
  Device device(milliseconds(200));
  device.start();
  const auto start = Clock::now();

  // A stream synchronisation of the application: ends when the communicators are aborted.
  while (device.aborts == 0 && seconds_since(start) < 10) {
    std::this_thread::sleep_for(milliseconds(1));
  }

  EXPECT_GE(seconds_since(start), 0.2);
  EXPECT_LT(seconds_since(start), 5);
  device.finished = true;  // as an event of an aborted collective is
  const std::string waited = text_of([&] { device.watch.wait({}); });
  EXPECT_NE(waited.find("layer3"), std::string::npos) << waited;
  EXPECT_TRUE(device.failures.failed());
  EXPECT_FALSE(text_of([&] { device.watch.check(); }).empty());
  meet();
}

TEST(DeviceWatch, EndsAWaitWhenAnotherRankFails) {
  if (job_size() == 1) return;  // nobody else
  Device device(std::chrono::seconds(60));
  device.start();

  if (job_rank() == 0) {
    device.failures.fail("the disk of this rank is full");
  } else {
    const std::string text = text_of([&] { device.watch.wait({}); });
    EXPECT_NE(text.find("the disk of this rank is full"), std::string::npos) << text;
    EXPECT_GE(device.aborts, 1);
  }
  meet();
}

TEST(DeviceWatch, ReportsAnErrorOfACommunicator) {
  Device device(std::chrono::seconds(60));
  device.error = "remote process exited";
  device.start();

  const std::string text = text_of([&] { device.watch.wait({}); });

  EXPECT_NE(text.find("remote process exited"), std::string::npos) << text;
  EXPECT_GE(device.aborts, 1);
  meet();
}

TEST(DeviceWatch, NothingIsAvailableAfterAnAbort) {
  Device device(std::chrono::seconds(60));
  device.watch.abort_all();
  device.finished = true;

  EXPECT_THROW(device.watch.wait({}), CommError);
  EXPECT_THROW(device.watch.check(), CommError);
  EXPECT_GE(device.aborts, 1);
  meet();
}

// One communicator's collective may be queued behind another's: an abort that waits for it ends
// when the other has been aborted, too.
TEST(DeviceWatch, AbortsThatWaitForOneAnotherEnd) {
  Device device(std::chrono::seconds(60));
  std::atomic<bool> later_told = false;
  std::atomic<bool> ended = false;
  const auto member = [](std::function<void()> abort) {
    return DeviceWatch::Member{
        .ranks = Device::all_ranks(), .abort = std::move(abort), .error = {}};
  };
  const int first = device.watch.add(member([&] {
    const auto start = Clock::now();
    while (!later_told && seconds_since(start) < 3) std::this_thread::yield();
    ended = later_told.load();
  }));
  const int second = device.watch.add(member([&] { later_told = true; }));

  device.watch.abort_all();

  EXPECT_TRUE(ended);
  device.watch.remove(first);
  device.watch.remove(second);
  meet();
}

TEST(DeviceWatch, ForgetsFinishedOperations) {
  Device device(std::chrono::seconds(60));
  for (int i = 0; i < 1000; ++i) device.watch.record(device.member, stuck, {Marker()}, {});
  EXPECT_GE(device.watch.in_flight(), 1000U);

  device.finished = true;
  for (int i = 0; i < 1000; ++i) device.watch.record(device.member, stuck, {Marker()}, {});

  EXPECT_LE(device.watch.in_flight(), 100U);
  meet();
}

}  // namespace
}  // namespace mics::comm::test
