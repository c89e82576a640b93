// SPDX-License-Identifier: Apache-2.0
#include <mics/checkpoint/detail/io_threads.hpp>

#include <utility>

namespace mics::checkpoint::detail {

std::future<void> IoThreads::submit(std::packaged_task<void()> request) {
  constexpr std::size_t count = 2;  // one request follows the other without a gap
  while (threads_.size() < count) {
    threads_.emplace_back([this](const std::stop_token& stop) { serve(stop); });
  }
  std::future<void> done = request.get_future();
  {
    const std::lock_guard lock(mutex_);
    requests_.push_back(std::move(request));
  }
  arrived_.notify_one();
  return done;
}

void IoThreads::serve(const std::stop_token& stop) {
  while (true) {
    std::packaged_task<void()> request;
    {
      std::unique_lock lock(mutex_);
      if (!arrived_.wait(lock, stop, [this] { return !requests_.empty(); })) return;
      if (stop.stop_requested()) return;
      request = std::move(requests_.front());
      requests_.pop_front();
    }
    request();
  }
}

Requests::~Requests() {
  for (const std::future<void>& request : under_way_) {
    if (request.valid()) request.wait();
  }
}

void Requests::finish(std::size_t buffer) {
  if (under_way_[buffer].valid()) under_way_[buffer].get();
}

void Requests::begin(std::size_t buffer, IoThreads& threads, std::packaged_task<void()> request) {
  under_way_[buffer] = threads.submit(std::move(request));
}

}  // namespace mics::checkpoint::detail
