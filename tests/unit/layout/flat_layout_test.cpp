// SPDX-License-Identifier: Apache-2.0
#include <mics/layout/flat_layout.hpp>
#include <mics/layout/interval.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace mics::layout {
namespace {

using Counts = std::vector<std::int64_t>;

/// Every property that a layout has, whatever the counts.
void expect_consistent(const FlatLayout& layout, const Counts& counts, int p, int q) {
  ASSERT_EQ(layout.parameters(), std::ssize(counts));
  ASSERT_EQ(layout.shards(), p);
  ASSERT_EQ(layout.slices(), q);

  std::int64_t used = 0;
  std::int64_t next = 0;  // where the parameter may start at the earliest
  for (std::int64_t i = 0; i < std::ssize(counts); ++i) {
    const Interval& range = layout.parameter(i);
    ASSERT_EQ(range.length, counts[static_cast<std::size_t>(i)]);
    ASSERT_EQ(range.offset % parameter_alignment, 0) << "parameter " << i;
    ASSERT_GE(range.offset, next) << "parameter " << i;
    ASSERT_LT(range.offset - next, parameter_alignment) << "parameter " << i << " wastes elements";
    next = range.end();
    used += range.length;
  }
  ASSERT_EQ(layout.used(), used);

  // Shards and slices partition the buffer, which is padded once and by less than it must be.
  ASSERT_GE(layout.count(), next);
  ASSERT_LT(layout.count() - next, p * q * slice_alignment);
  ASSERT_EQ(layout.slice_count() % slice_alignment, 0);
  ASSERT_EQ(layout.shard_count(), layout.slice_count() * q);
  ASSERT_EQ(layout.count(), layout.shard_count() * p);
  std::int64_t position = 0;
  for (int tau = 0; tau < p; ++tau) {
    ASSERT_EQ(layout.shard(tau).offset, position);
    for (int rho = 0; rho < q; ++rho) {
      ASSERT_EQ(layout.slice(tau, rho).offset, position);
      position = layout.slice(tau, rho).end();
    }
    ASSERT_EQ(layout.shard(tau).end(), position);
  }
  ASSERT_EQ(position, layout.count());

  // Gaps are the rest: ascending, not touching a parameter, nothing left out.
  std::int64_t in_gaps = 0;
  std::int64_t end = 0;
  for (const Interval& gap : layout.gaps()) {
    ASSERT_GT(gap.length, 0);
    ASSERT_GE(gap.offset, end);
    end = gap.end();
    in_gaps += gap.length;
  }
  ASSERT_LE(end, layout.count());
  ASSERT_EQ(in_gaps, layout.count() - layout.used());
}

/// Parameters that hold an element of `range`, one after another.
std::pair<std::int64_t, std::int64_t> parameters_by_search(const FlatLayout& layout,
                                                           const Interval& range) {
  std::int64_t first = -1;
  std::int64_t last = -1;
  for (std::int64_t i = 0; i < layout.parameters(); ++i) {
    if (intersection(layout.parameter(i), range).length == 0) continue;
    if (first < 0) first = i;
    last = i + 1;
  }
  return {first, last};
}

void expect_parameters_in_like_search(const FlatLayout& layout, const Interval& range) {
  const auto expected = parameters_by_search(layout, range);
  const auto [first, last] = layout.parameters_in(range);
  SCOPED_TRACE("range " + std::to_string(range.offset) + "+" + std::to_string(range.length));
  if (expected.first < 0) {
    // Nothing but parameters without elements may be in it.
    for (std::int64_t i = first; i < last; ++i) EXPECT_EQ(layout.parameter(i).length, 0);
    return;
  }
  // Parameters without elements may stand at either end.
  EXPECT_LE(first, expected.first);
  EXPECT_GE(last, expected.second);
  for (std::int64_t i = first; i < expected.first; ++i) EXPECT_EQ(layout.parameter(i).length, 0);
  for (std::int64_t i = expected.second; i < last; ++i) EXPECT_EQ(layout.parameter(i).length, 0);
}

TEST(FlatLayoutTest, ReproducesTheExampleOfItsComment) {
  const auto layout = FlatLayout::make(Counts{100, 64, 0, 3}, 2, 1);

  EXPECT_EQ(layout.parameter(0), (Interval{0, 100}));
  EXPECT_EQ(layout.parameter(1), (Interval{128, 64}));
  EXPECT_EQ(layout.parameter(2), (Interval{192, 0}));
  EXPECT_EQ(layout.parameter(3), (Interval{192, 3}));
  EXPECT_EQ(layout.count(), 512);
  EXPECT_EQ(layout.shard(0), (Interval{0, 256}));
  EXPECT_EQ(layout.shard(1), (Interval{256, 256}));
}

TEST(FlatLayoutTest, HoldsAllItsPropertiesForManyCountsShardsAndSlices) {
  const std::vector<Counts> cases{{},
                                  {0},
                                  {0, 0, 0},
                                  {1},
                                  {63},
                                  {64},
                                  {65},
                                  {255, 1},
                                  {256},
                                  {257},
                                  {0, 1, 63, 64, 65, 0},
                                  {65, 64, 63, 1, 0, 1},
                                  {1000, 0, 7, 12'345, 1},
                                  {1, 1, 1, 1, 1, 1, 1, 1, 1},
                                  {(std::int64_t{1} << 31) + 7, 3, (std::int64_t{1} << 31) + 7}};
  for (const Counts& counts : cases) {
    for (const int p : {1, 2, 3, 4, 5, 7, 8, 64, 512}) {
      for (const int q : {1, 2, 3, 8}) {
        SCOPED_TRACE(testing::PrintToString(counts) + " p=" + std::to_string(p) +
                     " q=" + std::to_string(q));

        const auto layout = FlatLayout::make(counts, p, q);

        expect_consistent(layout, counts, p, q);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(FlatLayoutTest, FindsTheParametersOfAnyRange) {
  const Counts counts{0, 5, 64, 0, 0, 65, 1, 200, 0};
  const auto layout = FlatLayout::make(counts, 3, 1);

  for (std::int64_t offset = 0; offset < layout.count(); offset += 7) {
    for (const std::int64_t length : {0, 1, 30, 59, 64, 129, 300, 768}) {
      const Interval range{offset, std::min<std::int64_t>(length, layout.count() - offset)};
      if (range.length == 0) continue;
      expect_parameters_in_like_search(layout, range);
    }
  }
}

TEST(FlatLayoutTest, LaysOutTenThousandParameters) {
  Counts counts;
  for (std::int64_t i = 0; i < 10'000; ++i) counts.push_back(1 + i * 7919 % 1000);

  const auto layout = FlatLayout::make(counts, 8, 4);

  expect_consistent(layout, counts, 8, 4);
  std::int64_t seen = 0;
  for (int tau = 0; tau < 8; ++tau) {
    for (int rho = 0; rho < 4; ++rho) {
      const Interval slice = layout.slice(tau, rho);
      expect_parameters_in_like_search(layout, slice);
      const auto [first, last] = layout.parameters_in(slice);
      for (std::int64_t i = first; i < last; ++i) {
        seen += intersection(layout.parameter(i), slice).length;
      }
    }
  }
  EXPECT_EQ(seen, layout.used());
}

TEST(FlatLayoutTest, CountsOffsetsBeyond32Bits) {
  const std::int64_t big = (std::int64_t{1} << 31) + 7;

  const auto layout = FlatLayout::make(Counts{big, 1, big, 65}, 4, 1);

  EXPECT_EQ(layout.parameter(1).offset, (std::int64_t{1} << 31) + 64);
  EXPECT_EQ(layout.parameter(2).offset, (std::int64_t{1} << 31) + 128);
  EXPECT_EQ(layout.parameter(3).offset, (std::int64_t{1} << 32) + 192);
  EXPECT_GT(layout.shard(3).offset, std::int64_t{1} << 31);
  expect_parameters_in_like_search(layout, layout.shard(1));
  expect_parameters_in_like_search(layout, {layout.parameter(3).offset, 1});
}

TEST(IntervalTest, IntersectsAndRounds) {
  static_assert(intersection({0, 5}, {3, 9}) == Interval{3, 2});
  static_assert(intersection({0, 5}, {5, 9}).empty());
  static_assert(intersection({7, 2}, {0, 3}).length == 0);
  static_assert(round_up(0, 64) == 0 && round_up(1, 64) == 64 && round_up(64, 64) == 64);
  EXPECT_EQ(round_up((std::int64_t{1} << 40) + 1, 256), (std::int64_t{1} << 40) + 256);
}

}  // namespace
}  // namespace mics::layout
