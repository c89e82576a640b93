// SPDX-License-Identifier: Apache-2.0
#include <mics/parallel/slot_schedule.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace mics::parallel {
namespace {

// One pass in which each unit of `order` is leased and released before the next; returns fetches.
int run_pass(SlotSchedule& schedule, const std::vector<int>& order, Pass pass = Pass::training) {
  int fetches = 0;
  schedule.begin(pass);
  for (const int unit : order) {
    if (schedule.acquire(unit).fetch) ++fetches;
    while (schedule.next_prefetch().unit >= 0) ++fetches;
    schedule.release(unit, false);
  }
  schedule.end();
  return fetches;
}

void run_and_confirm(SlotSchedule& schedule, const std::vector<int>& order) {
  run_pass(schedule, order);
  if (schedule.has_unconfirmed()) schedule.confirm();
}

// Fewest fetches of a sequence with k slots that start empty: at each miss the unit whose next use
// is farthest goes (Belady 1966), by plain search.
int optimal_fetches(const std::vector<int>& sequence, std::size_t k) {
  std::set<int> held;
  int fetches = 0;
  for (std::size_t i = 0; i < sequence.size(); ++i) {
    if (held.contains(sequence[i])) continue;
    ++fetches;
    if (held.size() == k) {
      const auto next = [&](int unit) {
        return std::find(sequence.begin() + static_cast<std::ptrdiff_t>(i), sequence.end(), unit);
      };
      held.erase(*std::max_element(held.begin(), held.end(),
                                   [&](int a, int b) { return next(a) < next(b); }));
    }
    held.insert(sequence[i]);
  }
  return fetches;
}

std::vector<int> forward_and_backward(int units) {
  std::vector<int> order;
  for (int u = 0; u < units; ++u) order.push_back(u);
  for (int u = units - 1; u >= 0; --u) order.push_back(u);
  return order;
}

TEST(SlotScheduleTest, FetchesAsSeldomAsAnyScheduleCould) {
  std::mt19937 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    const int units = 2 + static_cast<int>(random() % 6);
    const int slots = 1 + static_cast<int>(random() % 4);
    std::vector<int> order(1 + random() % 30);
    for (int& unit : order) unit = static_cast<int>(random() % static_cast<unsigned>(units));
    SlotSchedule schedule(units, slots, 0, true);
    run_and_confirm(schedule, order);
    schedule.invalidate();

    const int fetches = run_pass(schedule, order);

    EXPECT_EQ(fetches, optimal_fetches(order, static_cast<std::size_t>(slots)));
  }
}

TEST(SlotScheduleTest, PrefetchingCostsNoFetchInForwardAndBackward) {
  for (int units = 1; units <= 12; ++units) {
    for (int slots = 2; slots <= 4; ++slots) {
      const auto order = forward_and_backward(units);
      SlotSchedule schedule(units, slots, slots - 1, true);
      run_and_confirm(schedule, order);
      schedule.invalidate();

      EXPECT_EQ(run_pass(schedule, order), std::max(units, 2 * units - slots))
          << units << " units in " << slots << " slots";
    }
  }
}

TEST(SlotScheduleTest, GathersAheadOnceAnOrderIsConfirmed) {
  SlotSchedule schedule(3, 2, 1, true);
  run_and_confirm(schedule, {0, 1, 2});
  schedule.invalidate();

  schedule.begin(Pass::training);
  EXPECT_TRUE(schedule.following());
  EXPECT_TRUE(schedule.acquire(0).fetch);
  const auto ahead = schedule.next_prefetch();
  EXPECT_EQ(ahead.unit, 1);
  EXPECT_EQ(schedule.next_prefetch().unit, -1);
  schedule.release(0, false);

  EXPECT_FALSE(schedule.acquire(1).fetch);
  EXPECT_EQ(schedule.next_prefetch().unit, 2);
}

TEST(SlotScheduleTest, RecordsAnewAfterADeparture) {
  SlotSchedule schedule(3, 2, 1, true);
  run_and_confirm(schedule, {0, 1, 2});

  run_pass(schedule, {0, 2, 1});

  EXPECT_TRUE(schedule.take_departure());
  EXPECT_FALSE(schedule.take_departure());
  ASSERT_TRUE(schedule.has_unconfirmed());
  schedule.confirm();
  run_pass(schedule, {0, 2, 1});
  EXPECT_FALSE(schedule.take_departure());
}

TEST(SlotScheduleTest, RemembersEvaluationApartFromTraining) {
  SlotSchedule schedule(3, 2, 1, true);
  run_and_confirm(schedule, {0, 1, 2, 2, 1, 0});
  run_pass(schedule, {0, 1, 2}, Pass::evaluation);
  ASSERT_TRUE(schedule.has_unconfirmed());
  schedule.confirm();

  run_pass(schedule, {0, 1, 2, 2, 1, 0});
  run_pass(schedule, {0, 1, 2}, Pass::evaluation);

  EXPECT_FALSE(schedule.take_departure());
  EXPECT_FALSE(schedule.has_unconfirmed());
}

TEST(SlotScheduleTest, HashTellsOrdersApart) {
  const auto hash = [](const std::vector<int>& order) {
    SlotSchedule schedule(3, 1, 0, true);
    run_pass(schedule, order);
    return schedule.unconfirmed_hash();
  };

  EXPECT_EQ(hash({0, 1, 2}), hash({0, 1, 2}));
  EXPECT_NE(hash({0, 1, 2}), hash({0, 2, 1}));
  EXPECT_NE(hash({0, 1}), hash({0, 1, 1}));
}

TEST(SlotScheduleTest, KeepsAKeptUnitWhileAnotherSlotCanGo) {
  SlotSchedule schedule(3, 2, 0, true);
  ASSERT_TRUE(schedule.acquire(0).fetch);
  schedule.release(0, true);
  ASSERT_TRUE(schedule.acquire(1).fetch);
  schedule.release(1, false);

  EXPECT_EQ(schedule.acquire(2).evicted, 1);
  EXPECT_GE(schedule.slot_of(0), 0);
  // A hint, no right: with every other slot leased the kept one goes.
  EXPECT_EQ(schedule.acquire(1).evicted, 0);
}

// Random calls against a model of what a lease promises: the unit stays in its slot, one slot a
// unit, and a gather is refused only if every slot is leased.
TEST(SlotScheduleTest, RandomCallsNeverMoveALeasedUnit) {
  std::mt19937 random(2);
  for (int trial = 0; trial < 200; ++trial) {
    const int units = 2 + static_cast<int>(random() % 5);
    const int slots = 1 + static_cast<int>(random() % 3);
    SlotSchedule schedule(units, slots, static_cast<int>(random() % 3), random() % 2 == 0);
    std::map<int, std::vector<int>> leases;  // unit -> slots its leases were given
    const auto leased_slots = [&] {
      std::set<int> result;
      for (const auto& [unit, given] : leases) result.insert(given.begin(), given.end());
      return result;
    };
    for (int call = 0; call < 200; ++call) {
      const int unit = static_cast<int>(random() % static_cast<unsigned>(units));
      switch (random() % 8) {
        case 0: {
          schedule.begin(random() % 2 == 0 ? Pass::training : Pass::evaluation);
          if (schedule.has_unconfirmed()) schedule.confirm();
          break;
        }
        case 1:
          schedule.invalidate();
          break;
        case 2:
        case 3:
        case 4: {
          const bool resident = schedule.slot_of(unit) >= 0;
          const bool full = static_cast<int>(leased_slots().size()) == slots;
          const auto acquired = schedule.acquire(unit);
          ASSERT_EQ(acquired.slot < 0, !resident && full);
          if (acquired.slot >= 0) {
            ASSERT_EQ(acquired.fetch, !resident);
            leases[unit].push_back(acquired.slot);
          }
          for (auto next = schedule.next_prefetch(); next.unit >= 0;
               next = schedule.next_prefetch()) {
            ASSERT_FALSE(leased_slots().contains(next.slot));
          }
          break;
        }
        default: {
          if (!leases.contains(unit)) break;
          leases[unit].pop_back();
          if (leases[unit].empty()) leases.erase(unit);
          schedule.release(unit, random() % 3 == 0);
        }
      }
      for (const auto& [leased, given] : leases) {
        for (const int slot : given) ASSERT_EQ(schedule.slot_of(leased), slot);
      }
      std::set<int> held;
      for (const auto& slot : schedule.slots()) {
        if (slot.unit < 0) continue;
        ASSERT_TRUE(held.insert(slot.unit).second);
      }
    }
  }
}

}  // namespace
}  // namespace mics::parallel
