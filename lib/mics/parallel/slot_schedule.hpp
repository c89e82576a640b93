// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace mics::parallel {

/// Kinds of passes: each has an order of units of its own.
enum class Pass : std::uint8_t { training, evaluation };

/// Which unit lies in which of k gather slots, which to gather next and which to drop. Pure
/// bookkeeping, the same on every rank that makes the same calls: it knows neither memory nor
/// communication, so a plan can be made from it before a job.
///
/// A pass is recorded once; when the engine has seen that all ranks recorded the same, the next
/// pass of that kind is followed: the units that come next are prefetched, and of the slots that
/// may be given up the one whose unit is needed last. A call that departs from the order ends
/// following for that pass, which is then recorded anew.
class SlotSchedule {
 public:
  /// \param slots  k >= 1; \param prefetch  units to start ahead, at most k - 1 have room
  /// \param retain  whether a unit stays in its slot after its last lease (until it is given up)
  SlotSchedule(int units, int slots, int prefetch, bool retain);

  struct Slot {
    int unit = -1;      ///< -1: empty
    int leases = 0;     ///< open ones
    bool kept = false;  ///< not to be given up: the unit is gathered again at once
    std::int64_t last_use = 0;
  };
  struct Fetch {
    int unit = -1;
    int slot = -1;
    int evicted = -1;  ///< the unit that lay there, -1 if none
  };
  struct Acquired {
    int slot = -1;       ///< -1: every slot holds an open lease
    bool fetch = false;  ///< the unit has to be gathered into the slot
    int evicted = -1;
  };

  /// Ends the pass under way and opens one.
  void begin(Pass pass);
  void end();
  /// True between passes if the order that was just recorded should be agreed on and confirmed.
  [[nodiscard]] bool has_unconfirmed() const { return unconfirmed_; }
  [[nodiscard]] std::uint64_t unconfirmed_hash() const;
  void confirm();
  /// Sets the order of a pass; to be confirmed like a recorded one.
  void declare(Pass pass, std::vector<int> order);
  /// Forgets an order that was not confirmed.
  void reject() { unconfirmed_ = false; }

  /// Opens a lease on `unit`.
  Acquired acquire(int unit);
  /// Ends one. With `keep` the slot is not given up until the unit is acquired again.
  void release(int unit, bool keep);
  /// The next unit to prefetch now, or unit -1: call until then.
  Fetch next_prefetch();
  /// Forgets all contents (parameters changed). No lease may be open.
  void invalidate();
  /// Forgets the content of one slot.
  void drop(int slot);

  /// True while calls follow a confirmed order: ranks need not check each gather.
  [[nodiscard]] bool following() const { return following_; }
  /// True once after a call departed from the order.
  [[nodiscard]] bool take_departure();
  [[nodiscard]] const std::vector<Slot>& slots() const { return slots_; }
  [[nodiscard]] int slot_of(int unit) const;

 private:
  [[nodiscard]] int victim(std::int64_t needed_before) const;
  [[nodiscard]] std::int64_t next_use(int unit) const;

  std::vector<Slot> slots_;
  int prefetch_;
  bool retain_;
  std::int64_t clock_ = 0;
  bool in_pass_ = false;
  Pass pass_ = Pass::training;
  std::map<Pass, std::vector<int>> orders_;      // confirmed
  std::vector<std::vector<std::int64_t>> uses_;  // by unit: positions in the order of this pass
  std::vector<int> recorded_;
  std::vector<int> candidate_;
  Pass candidate_pass_ = Pass::training;
  std::size_t position_ = 0;
  bool following_ = false;
  bool departed_ = false;
  bool unconfirmed_ = false;
};

}  // namespace mics::parallel
