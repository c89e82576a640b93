// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/parallel/slot_schedule.hpp>

#include <algorithm>
#include <limits>
#include <utility>

namespace mics::parallel {
namespace {

constexpr std::int64_t never = std::numeric_limits<std::int64_t>::max();

}  // namespace

SlotSchedule::SlotSchedule(int units, int slots, int prefetch, bool retain)
    : slots_(static_cast<std::size_t>(slots)),
      prefetch_(prefetch),
      retain_(retain),
      uses_(static_cast<std::size_t>(units)) {}

void SlotSchedule::begin(Pass pass) {
  end();
  in_pass_ = true;
  pass_ = pass;
  position_ = 0;
  recorded_.clear();
  for (auto& uses : uses_) uses.clear();
  const std::vector<int>& order = orders_[pass];
  following_ = !order.empty();
  for (std::size_t i = 0; i < order.size(); ++i) {
    uses_[static_cast<std::size_t>(order[i])].push_back(static_cast<std::int64_t>(i));
  }
}

void SlotSchedule::end() {
  if (!in_pass_) return;
  in_pass_ = false;
  following_ = false;
  if (!recorded_.empty() && recorded_ != orders_[pass_]) {
    candidate_ = recorded_;
    candidate_pass_ = pass_;
    unconfirmed_ = true;
  }
}

std::uint64_t SlotSchedule::unconfirmed_hash() const {
  std::uint64_t hash = hash_combine(0, static_cast<std::uint64_t>(candidate_pass_));
  for (const int unit : candidate_) hash = hash_combine(hash, static_cast<std::uint64_t>(unit));
  return hash_combine(hash, candidate_.size());
}

void SlotSchedule::confirm() {
  orders_[candidate_pass_] = std::move(candidate_);
  candidate_.clear();
  unconfirmed_ = false;
}

void SlotSchedule::declare(Pass pass, std::vector<int> order) {
  candidate_ = std::move(order);
  candidate_pass_ = pass;
  unconfirmed_ = true;
}

int SlotSchedule::slot_of(int unit) const {
  const auto found = std::find_if(slots_.begin(), slots_.end(),
                                  [&](const Slot& slot) { return slot.unit == unit; });
  return found == slots_.end() ? -1 : static_cast<int>(found - slots_.begin());
}

std::int64_t SlotSchedule::next_use(int unit) const {
  if (!following_) return never;
  const auto& uses = uses_[static_cast<std::size_t>(unit)];
  const auto here = static_cast<std::int64_t>(position_);
  const auto next = std::lower_bound(uses.begin(), uses.end(), here);
  if (next != uses.end()) return *next;
  // The next pass most likely runs in the same order.
  const auto length = static_cast<std::int64_t>(orders_.at(pass_).size());
  return uses.empty() ? never : length + uses.front();
}

// The slot to give up: an empty one, else the one whose unit is needed last, and after
// `needed_before`; among equals the one that was used longest ago. -1 if there is none.
int SlotSchedule::victim(std::int64_t needed_before) const {
  int best = -1;
  std::int64_t best_next = needed_before;
  for (std::size_t i = 0; i < slots_.size(); ++i) {
    const Slot& slot = slots_[i];
    if (slot.unit < 0) return static_cast<int>(i);
    if (slot.leases > 0 || slot.kept) continue;
    const std::int64_t next = next_use(slot.unit);
    const bool later = next > best_next;
    const bool older = best >= 0 && next == best_next &&
                       slot.last_use < slots_[static_cast<std::size_t>(best)].last_use;
    if (later || older) {
      best = static_cast<int>(i);
      best_next = next;
    }
  }
  return best;
}

SlotSchedule::Acquired SlotSchedule::acquire(int unit) {
  // A refused call leaves no trace: the caller may go on, and other ranks may not have made it.
  if (slot_of(unit) < 0 &&
      std::all_of(slots_.begin(), slots_.end(), [](const Slot& s) { return s.leases > 0; })) {
    return {};
  }
  ++clock_;
  if (in_pass_) {
    recorded_.push_back(unit);
    if (following_) {
      const std::vector<int>& order = orders_[pass_];
      if (position_ < order.size() && order[position_] == unit) {
        ++position_;
      } else {
        following_ = false;
        departed_ = true;
      }
    }
  }
  Acquired result;
  result.slot = slot_of(unit);
  if (result.slot < 0) {
    result.slot = victim(-1);
    if (result.slot < 0) {
      // Kept slots are a hint, open leases are not.
      const auto kept = std::find_if(slots_.begin(), slots_.end(),
                                     [](const Slot& slot) { return slot.leases == 0; });
      result.slot = static_cast<int>(kept - slots_.begin());
    }
    result.fetch = true;
    result.evicted = slots_[static_cast<std::size_t>(result.slot)].unit;
  }
  Slot& slot = slots_[static_cast<std::size_t>(result.slot)];
  slot.unit = unit;
  slot.kept = false;
  slot.last_use = clock_;
  ++slot.leases;
  return result;
}

void SlotSchedule::release(int unit, bool keep) {
  const int index = slot_of(unit);
  Slot& slot = slots_[static_cast<std::size_t>(index)];
  --slot.leases;
  slot.kept = slot.kept || keep;
  if (slot.leases == 0 && !retain_ && !slot.kept) drop(index);
}

SlotSchedule::Fetch SlotSchedule::next_prefetch() {
  Fetch fetch;
  if (!following_) return fetch;
  const std::vector<int>& order = orders_[pass_];
  int distinct = 0;
  for (std::size_t i = position_; i < order.size() && distinct < prefetch_; ++i) {
    const int unit = order[i];
    const bool seen = std::find(order.begin() + static_cast<std::ptrdiff_t>(position_),
                                order.begin() + static_cast<std::ptrdiff_t>(i),
                                unit) != order.begin() + static_cast<std::ptrdiff_t>(i);
    if (seen) continue;
    ++distinct;
    if (slot_of(unit) >= 0) continue;
    fetch.slot = victim(static_cast<std::int64_t>(i));
    if (fetch.slot < 0) return fetch;
    Slot& slot = slots_[static_cast<std::size_t>(fetch.slot)];
    fetch.unit = unit;
    fetch.evicted = slot.unit;
    slot = {.unit = unit, .leases = 0, .kept = false, .last_use = clock_};
    return fetch;
  }
  return fetch;
}

void SlotSchedule::invalidate() {
  for (Slot& slot : slots_) {
    if (slot.leases == 0) slot = {};
  }
}

void SlotSchedule::drop(int slot) { slots_[static_cast<std::size_t>(slot)] = {}; }

bool SlotSchedule::take_departure() { return std::exchange(departed_, false); }

}  // namespace mics::parallel
