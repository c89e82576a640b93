// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/vendor.hpp>
#include <mics/comm/detail/waiting.hpp>
#include <mics/comm/device_watch.hpp>
#include <mics/comm/helper_thread.hpp>

#include <algorithm>
#include <future>
#include <source_location>
#include <system_error>

namespace mics::comm {
namespace {

// A wait that has lasted so long lets other threads run between two looks. Being woken again takes
// as long as several small collectives.
constexpr std::chrono::milliseconds eager{5};
constexpr std::chrono::microseconds pause{20};
constexpr std::chrono::milliseconds longest_interval{100};
// That the thread leaves the host to end a late collective first, and that others have to answer:
// of short limits this part, of long ones a second.
constexpr int grace_part = 16;
constexpr std::chrono::milliseconds least_grace{100};
constexpr std::chrono::milliseconds longest_grace{1000};
// More operations than are usually under way at once: finished ones are looked for here.
constexpr std::size_t many_in_flight = 64;
constexpr int removed_at_once = 4;
// Aborts take milliseconds; one that takes so long waits for another process and is left alone.
constexpr std::chrono::seconds longest_abort{5};

int current_device() {
  int device = 0;
#ifdef MICS_HAS_DEVICE
  device::check(MICS_VENDOR(GetDevice)(&device), "current device");
#endif
  return device;
}

// A new thread of a program works with the first device, whichever its process uses.
void use_device([[maybe_unused]] int device) {
#ifdef MICS_HAS_DEVICE
  static_cast<void>(MICS_VENDOR(SetDevice)(device));
#endif
}

std::chrono::milliseconds grace_of(std::chrono::milliseconds timeout) {
  return std::clamp(timeout / grace_part, least_grace, longest_grace);
}

// On a thread that nobody has to wait for.
std::future<void> begin_abort(const std::function<void()>& action, int device) {
  std::packaged_task<void()> task([action, device] {
    block_signals();
    use_device(device);
    action();
  });
  std::future<void> end = task.get_future();
  std::thread(std::move(task)).detach();
  return end;
}

}  // namespace

DeviceWatch::DeviceWatch(FailureChannel& failures, const OperationLog& log,
                         std::chrono::milliseconds timeout, Probe probe)
    : failures_(failures),
      log_(log),
      timeout_(timeout),
      probe_(std::move(probe)),
      device_(current_device()),
      last_look_(Clock::now()) {
  if (!probe_) {
    probe_ = [](const Marker& marker, const Operation&, bool) { return marker.done(); };
  }
}

DeviceWatch::~DeviceWatch() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  stopped_.notify_all();
  if (thread_.joinable()) thread_.join();
}

int DeviceWatch::add(Member member) {
  const std::lock_guard members(members_mutex_);
  const int number = next_member_++;
  members_.emplace(number, std::move(member));
  {
    const std::lock_guard lock(mutex_);
    in_flight_[number];
  }
  if (!thread_.joinable()) thread_ = std::thread([this] { watch(); });
  return number;
}

void DeviceWatch::remove(int member) {
  const std::lock_guard members(members_mutex_);
  members_.erase(member);
  const std::lock_guard lock(mutex_);
  in_flight_.erase(member);
}

void DeviceWatch::record(int member, const Operation& operation, std::vector<Marker> before,
                         Marker after) {
  const std::lock_guard lock(mutex_);
  std::deque<InFlight>& queue = in_flight_[member];
  for (int i = 0; i < removed_at_once && queue.size() >= many_in_flight; ++i) {
    if (!probe_(queue.front().after, queue.front().operation, true)) break;
    queue.pop_front();
  }
  queue.push_back({operation, std::move(before), std::move(after), {}});
}

std::size_t DeviceWatch::in_flight() const {
  const std::lock_guard lock(mutex_);
  std::size_t count = 0;
  for (const auto& [number, queue] : in_flight_) count += queue.size();
  return count;
}

DeviceWatch::Clock::duration DeviceWatch::now() {
  const auto time = Clock::now();
  clock_ += std::min<Clock::duration>(time - last_look_, detail::absence);
  last_look_ = time;
  return clock_;
}

std::optional<DeviceWatch::Late> DeviceWatch::oldest(Clock::duration limit) {
  const std::lock_guard members(members_mutex_);
  const std::lock_guard lock(mutex_);
  const auto time = now();
  std::optional<Late> found;
  for (auto& [number, queue] : in_flight_) {
    // Only the first of a stream can be running.
    while (!queue.empty() && probe_(queue.front().after, queue.front().operation, true)) {
      queue.pop_front();
    }
    if (queue.empty()) continue;
    InFlight& first = queue.front();
    if (!first.began) {
      const bool can_begin =
          std::all_of(first.before.begin(), first.before.end(),
                      [&](const Marker& marker) { return probe_(marker, first.operation, false); });
      if (can_begin) first.began = time;
    }
    if (!first.began || time - *first.began < limit) continue;
    const auto age = time - *first.began;
    if (found && found->age >= age) continue;
    const auto member = members_.find(number);
    found = Late{first.operation,
                 member == members_.end() ? std::vector<int>{} : member->second.ranks, age};
  }
  return found;
}

void DeviceWatch::watch() {
  use_device(device_);
  const auto interval = std::clamp<std::chrono::milliseconds>(
      timeout_ / 50, std::chrono::milliseconds(1), longest_interval);
  while (true) {
    {
      std::unique_lock lock(mutex_);
      if (stopped_.wait_for(lock, interval, [this] { return stop_; })) return;
    }
    if (aborted_) continue;
    try {
      std::optional<Late> late = oldest(timeout_ + grace_of(timeout_));
      if (!late) continue;
      const std::lock_guard lock(mutex_);
      late_ = std::move(late);
    } catch (const DeviceError&) {
      continue;  // the device is lost, and the thread that uses it hears the same
    }
    expired_ = true;
    abort_all();
  }
}

std::string DeviceWatch::async_error() const {
  const std::lock_guard members(members_mutex_);
  for (const auto& [number, member] : members_) {
    if (!member.error) continue;
    if (std::string error = member.error(); !error.empty()) return error;
  }
  return {};
}

void DeviceWatch::abort_all() noexcept {
  aborted_ = true;
  const std::lock_guard members(members_mutex_);
  // All at once: an abort tells its collectives to end and then waits for them, and they may be
  // queued behind another communicator's, which would not have been told yet.
  std::vector<std::future<void>> ends;
  for (const auto& [number, member] : members_) {
    if (!member.abort) continue;
    try {
      ends.push_back(begin_abort(member.abort, device_));
    } catch (const std::system_error&) {  // no more threads
      member.abort();
    }
  }
  const auto limit = Clock::now() + longest_abort;
  for (const std::future<void>& end : ends) end.wait_until(limit);
}

std::vector<int> DeviceWatch::ask(const Late& late) {
  std::vector<int> asked;
  for (const int rank : late.ranks) {
    if (rank == failures_.rank() || asked.size() == detail::max_asked) continue;
    failures_.ask(rank);
    asked.push_back(rank);
  }
  return asked;
}

std::string DeviceWatch::text(const Late& late, const std::vector<int>& asked) const {
  // Who is silent first, then who does something else; a message has room for a few.
  std::string silent;
  std::string others;
  for (const int rank : asked) {
    const FailureChannel::Answer* const answer = failures_.answer_of(rank);
    if (answer == nullptr) {
      silent += ", " + failures_.answer_text(rank);
    } else if (answer->operation != late.operation.text()) {
      others += ", " + failures_.answer_text(rank);
    }
  }
  const std::string found = "it still runs" + silent + others;
  return format_error(
      {.object = late.operation.text() + " on rank " + std::to_string(failures_.rank()),
       .expected = "its end on the device within " + std::to_string(timeout_.count()) + " ms",
       .found = found,
       .remedy = "last operations here: " + log_.tail(8)},
      std::source_location::current());
}

void DeviceWatch::fail(const std::string& line) {
  failures_.fail(line, FailureKind::consequence);
  abort_all();
  failures_.poll();  // throws
  throw CommError(line);
}

// The collectives are aborted already: there is time for the others' answers.
void DeviceWatch::report_expired() {
  Late late;
  {
    const std::lock_guard lock(mutex_);
    late = *late_;
  }
  const std::vector<int> asked = ask(late);
  const auto end = Clock::now() + grace_of(timeout_);
  while (Clock::now() < end) {
    failures_.poll();
    const bool complete = std::all_of(
        asked.begin(), asked.end(), [&](int rank) { return failures_.answer_of(rank) != nullptr; });
    if (complete) break;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  fail(text(late, asked));
}

void DeviceWatch::check() {
  if (expired_ && !failures_.failed()) report_expired();
  try {
    failures_.poll();
  } catch (const CommError&) {
    abort_all();
    throw;
  }
  if (aborted_) {
    // The thread may have found a late operation since the look above.
    if (expired_) report_expired();
    raise<CommError>({.object = "communicators of the device",
                      .expected = "none aborted",
                      .found = "an abort before this call",
                      .remedy = "make a new engine"});
  }
}

void DeviceWatch::wait(const Marker& marker) {
  struct Waiting {
    FailureChannel& failures;
    ~Waiting() { failures.wait_for(nullptr); }
  } const waiting{failures_};
  const auto started = Clock::now();
  std::optional<Late> running;  // what this rank says that it waits for
  std::vector<int> asked;
  Clock::time_point asked_at{};
  for (int polls = 1; !probe_(marker, {}, true); ++polls) {
    if (Clock::now() - started > eager) {
      std::this_thread::sleep_for(pause);
    } else if (polls % detail::polls_between_checks != 0) {
      continue;
    }
    check();
    if (polls % detail::polls_between_checks != 0) continue;
    if (const std::string error = async_error(); !error.empty()) {
      fail(format_error(
          {.object = "a communicator of the device on rank " + std::to_string(failures_.rank()),
           .expected = "no error",
           .found = error,
           .remedy = "last operations here: " + log_.tail(8)},
          std::source_location::current()));
    }
    std::optional<Late> now_running = oldest(Clock::duration{0});
    if (!now_running) {
      running.reset();
      failures_.wait_for(nullptr);
      continue;
    }
    running = std::move(now_running);
    failures_.wait_for(&running->operation, [&running] { return running->ranks; });
    if (running->age <= timeout_ * 3 / 4) {
      asked_at = {};
      continue;
    }
    if (asked_at == Clock::time_point{}) {
      asked = ask(*running);
      asked_at = Clock::now();
    }
    if (running->age > timeout_ && Clock::now() - asked_at >= timeout_ / 4) {
      fail(text(*running, asked));
    }
  }
  check();
}

}  // namespace mics::comm
