// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/layout/flat_layout.hpp>

#include <algorithm>
#include <string>

namespace mics::layout {

FlatLayout FlatLayout::make(std::span<const std::int64_t> counts, int shards, int slices) {
  if (shards < 1 || slices < 1) {
    raise<ArgumentError>({.object = "flat layout",
                          .expected = "at least 1 shard and 1 slice",
                          .found = std::to_string(shards) + " and " + std::to_string(slices)});
  }
  FlatLayout layout;
  layout.shards_ = shards;
  layout.slices_ = slices;
  layout.parameters_.reserve(counts.size());
  std::int64_t end = 0;
  for (const std::int64_t count : counts) {
    if (count < 0) {
      raise<ArgumentError>({.object = "parameter",
                            .expected = "0 or more elements",
                            .found = std::to_string(count)});
    }
    const std::int64_t start = round_up(end, parameter_alignment);
    layout.parameters_.push_back({start, count});
    end = start + count;
    layout.used_ += count;
  }
  // Rounded up even when empty: an empty buffer has no shards and takes part in no collective.
  layout.count_ = round_up(end, slice_alignment * shards * slices);
  return layout;
}

std::pair<std::int64_t, std::int64_t> FlatLayout::parameters_in(const Interval& range) const {
  const auto first =
      std::partition_point(parameters_.begin(), parameters_.end(),
                           [&](const Interval& p) { return p.end() <= range.offset; });
  const auto last = std::partition_point(first, parameters_.end(),
                                         [&](const Interval& p) { return p.offset < range.end(); });
  return {first - parameters_.begin(), last - parameters_.begin()};
}

std::vector<Interval> FlatLayout::gaps() const {
  std::vector<Interval> result;
  std::int64_t end = 0;
  for (const Interval& parameter : parameters_) {
    if (parameter.offset > end) result.push_back({end, parameter.offset - end});
    end = parameter.end();
  }
  if (count_ > end) result.push_back({end, count_ - end});
  return result;
}

}  // namespace mics::layout
