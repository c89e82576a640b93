// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/execution.hpp>
#include <mics/base/vendor.hpp>

#include <mutex>
#include <vector>

namespace mics {

#ifdef MICS_HAS_DEVICE
namespace {

using Event = MICS_VENDOR(Event_t);

Event event_of(const std::shared_ptr<void>& event) { return static_cast<Event>(event.get()); }

// Events that no marker uses. Making one takes a lock of the driver; a step makes many markers.
class EventPool {
 public:
  Event take() {
    {
      const std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        const Event event = free_.back();
        free_.pop_back();
        return event;
      }
    }
    Event event = nullptr;
    device::check(MICS_VENDOR(EventCreateWithFlags)(&event, MICS_VENDOR(EventDisableTiming)),
                  "creation of an event");
    return event;
  }
  void give_back(Event event) {
    const std::lock_guard lock(mutex_);
    free_.push_back(event);
  }

 private:
  std::mutex mutex_;
  std::vector<Event> free_;
};

constexpr std::size_t max_gates = 16;

EventPool& pool() {
  static auto* const kept = new EventPool;  // markers may outlive static objects
  return *kept;
}

}  // namespace
#endif

bool Marker::done() const {
#ifdef MICS_HAS_DEVICE
  if (event_ != nullptr) {
    const auto status = MICS_VENDOR(EventQuery)(event_of(event_));
    if (status == MICS_VENDOR(ErrorNotReady)) return false;
    device::check(status, "query of an event");
  }
#endif
  if (instance_ != nullptr) instance_->fence("mics::Marker::done");
  return true;
}

void Marker::wait(const std::string& reason) const {
#ifdef MICS_HAS_DEVICE
  if (event_ != nullptr) {
    device::check(MICS_VENDOR(EventSynchronize)(event_of(event_)), reason);
  }
#endif
  if (instance_ != nullptr) instance_->fence(reason);
}

Marker Execution::mark() const {
  Marker marker;
#ifdef MICS_HAS_DEVICE
  if (stream() != nullptr || !reaches_host()) {
    const Event event = pool().take();
    marker.event_ = std::shared_ptr<void>(
        static_cast<void*>(event), [](void* used) { pool().give_back(static_cast<Event>(used)); });
    device::check(MICS_VENDOR(EventRecord)(event, static_cast<MICS_VENDOR(Stream_t)>(stream())),
                  "recording of an event");
    self_->gates.assign(1, marker);
    return marker;
  }
#endif
  marker.instance_ = self_;
  return marker;
}

void Execution::wait_for(const Marker& marker) const {
#ifdef MICS_HAS_DEVICE
  if (marker.event_ != nullptr && !reaches_host()) {
    device::check(MICS_VENDOR(StreamWaitEvent)(static_cast<MICS_VENDOR(Stream_t)>(stream()),
                                               event_of(marker.event_), 0),
                  "wait of a stream for an event");
    // Many waits and no marker between them: a marker stands for all of them.
    if (self_->gates.size() == max_gates)
      static_cast<void>(mark());
    else
      self_->gates.push_back(marker);
    return;
  }
#endif
  marker.wait("mics: work of another instance is done before it is used");
}

}  // namespace mics
