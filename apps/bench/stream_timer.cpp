// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/vendor.hpp>

#include <bench/stream_timer.hpp>

#include <chrono>

namespace mics::apps::bench {

#ifdef MICS_HAS_DEVICE

struct StreamTimer::Points {
  MICS_VENDOR(Event_t) begin = nullptr;
  MICS_VENDOR(Event_t) end = nullptr;

  Points() {
    device::check(MICS_VENDOR(EventCreate)(&begin), "creation of an event");
    device::check(MICS_VENDOR(EventCreate)(&end), "creation of an event");
  }
  ~Points() {
    (void)MICS_VENDOR(EventDestroy)(begin);
    (void)MICS_VENDOR(EventDestroy)(end);
  }
  Points(const Points&) = delete;
  Points& operator=(const Points&) = delete;
};

void StreamTimer::start() {
  const auto stream = static_cast<MICS_VENDOR(Stream_t)>(exec_.stream());
  device::check(MICS_VENDOR(EventRecord)(points_->begin, stream), "recording of an event");
}

void StreamTimer::stop() {
  const auto stream = static_cast<MICS_VENDOR(Stream_t)>(exec_.stream());
  device::check(MICS_VENDOR(EventRecord)(points_->end, stream), "recording of an event");
}

double StreamTimer::seconds() const {
  device::check(MICS_VENDOR(EventSynchronize)(points_->end), "what is timed");
  float milliseconds = 0;
  device::check(MICS_VENDOR(EventElapsedTime)(&milliseconds, points_->begin, points_->end),
                "time between two events");
  return 1e-3 * milliseconds;
}

#else

struct StreamTimer::Points {
  std::chrono::steady_clock::time_point begin, end;
};

void StreamTimer::start() {
  exec_.fence("bench: what was enqueued before is not timed");
  points_->begin = std::chrono::steady_clock::now();
}

void StreamTimer::stop() {
  exec_.fence("bench: what is timed is done");
  points_->end = std::chrono::steady_clock::now();
}

double StreamTimer::seconds() const {
  return std::chrono::duration<double>(points_->end - points_->begin).count();
}

#endif

StreamTimer::StreamTimer(const Execution& exec)
    : exec_(exec), points_(std::make_unique<Points>()) {}
StreamTimer::~StreamTimer() = default;

}  // namespace mics::apps::bench
