// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/detail/io_threads.hpp>

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <vector>

namespace mics::checkpoint::detail::test {
namespace {

// Fails if a request is lost or done twice.
TEST(IoThreads, DoEachRequestOnce) {
  std::vector<int> done(1000);
  {
    IoThreads threads;
    Requests requests;
    for (std::size_t i = 0; i < done.size(); ++i) {
      requests.finish(i % request_count);
      requests.begin(i % request_count, threads,
                     std::packaged_task<void()>([&done, i] { ++done[i]; }));
    }
  }
  EXPECT_EQ(done, std::vector<int>(1000, 1));
}

TEST(IoThreads, TellWhatARequestThrew) {
  IoThreads threads;
  Requests requests;
  requests.begin(0, threads, std::packaged_task<void()>([] { throw IoError("no disk"); }));
  requests.begin(1, threads, std::packaged_task<void()>([] {}));
  EXPECT_THROW(requests.finish(0), IoError);
  requests.finish(0);  // told once
  requests.finish(1);
}

// Fails if memory goes before a request that uses it has ended.
TEST(IoThreads, RequestsAreWaitedForWhenAnErrorEndsTheirScope) {
  std::atomic<int> ended = 0;
  std::promise<void> release;
  std::shared_future<void> released = release.get_future().share();
  IoThreads threads;
  std::future<void> scope = std::async(std::launch::async, [&] {
    Requests requests;
    for (std::size_t i = 0; i < request_count; ++i) {
      requests.begin(i, threads, std::packaged_task<void()>([&ended, released] {
                       released.wait();
                       ++ended;
                     }));
    }
    throw IoError("another request failed");
  });
  release.set_value();
  EXPECT_THROW(scope.get(), IoError);
  EXPECT_EQ(ended, static_cast<int>(request_count));
}

}  // namespace
}  // namespace mics::checkpoint::detail::test
