// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/comm/watchdog.hpp>

#include <algorithm>
#include <source_location>
#include <utility>

namespace mics::comm {

Watchdog::Watchdog(std::string what, std::chrono::milliseconds timeout,
                   std::function<void(const std::string&)> on_stuck)
    : what_(std::move(what)), timeout_(timeout), on_stuck_(std::move(on_stuck)) {
  if (on_stuck_) thread_ = std::thread([this] { watch(); });
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    done_ = true;
  }
  ended_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Watchdog::stage(std::string stage) {
  const std::lock_guard lock(mutex_);
  stage_ = std::move(stage);
}

void Watchdog::watch() {
  std::unique_lock lock(mutex_);
  // Counted in short waits: a time in which the process was suspended counts as one of them.
  constexpr std::chrono::milliseconds longest{100};
  for (std::chrono::milliseconds waited{0}; waited < timeout_;) {
    const auto next = std::min(timeout_ - waited, longest);
    if (ended_.wait_for(lock, next, [this] { return done_; })) return;
    waited += next;
  }
  const std::string line = format_error(
      {.object = what_,
       .expected = "all ranks within " + std::to_string(timeout_.count()) + " ms",
       .found = "a wait in " + (stage_.empty() ? std::string("its first collective") : stage_),
       .remedy = "every rank of the communicator must make this call; look for one that ended"},
      std::source_location::current());
  lock.unlock();
  on_stuck_(line);
}

}  // namespace mics::comm
