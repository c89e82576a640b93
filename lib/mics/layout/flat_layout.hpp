// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/layout/interval.hpp>

#include <cstdint>
#include <span>
#include <vector>

namespace mics::layout {

/// A parameter starts at a multiple of this many elements: 128 bytes in 16-bit types. Counted in
/// elements so that offsets are the same in the compute, wire, accumulator and master copies.
inline constexpr std::int64_t parameter_alignment = 64;
/// A shard and a slice are multiples of this many elements.
inline constexpr std::int64_t slice_alignment = 256;

/// Parameters of one dtype end to end in one buffer, cut into p equal shards of q equal slices.
///
/// Example: counts {100, 64, 0, 3}, p = 2, q = 1: starts 0, 128, 192, 192; the last element is 194;
/// the buffer holds 512 elements, shard 0 is [0, 256), shard 1 [256, 512). Gaps and the padded end
/// are zero and stay zero.
class FlatLayout {
 public:
  /// \param counts  elements of each parameter, 0 allowed
  /// \param shards  p, the ranks of the shard group
  /// \param slices  q, the ranks that share the optimizer state of one shard (1 or R)
  [[nodiscard]] static FlatLayout make(std::span<const std::int64_t> counts, int shards,
                                       int slices);

  [[nodiscard]] std::int64_t count() const { return count_; }  ///< padded, all shards
  [[nodiscard]] std::int64_t used() const { return used_; }    ///< elements that parameters hold
  [[nodiscard]] std::int64_t shard_count() const { return count_ / shards_; }
  [[nodiscard]] std::int64_t slice_count() const { return count_ / shards_ / slices_; }
  [[nodiscard]] int shards() const { return shards_; }
  [[nodiscard]] int slices() const { return slices_; }
  [[nodiscard]] Interval shard(int tau) const { return {tau * shard_count(), shard_count()}; }
  /// Slice rho of shard tau, in elements of the buffer.
  [[nodiscard]] Interval slice(int tau, int rho) const {
    return {tau * shard_count() + rho * slice_count(), slice_count()};
  }
  [[nodiscard]] std::int64_t parameters() const {
    return static_cast<std::int64_t>(parameters_.size());
  }
  /// Where parameter i lies in the buffer.
  [[nodiscard]] const Interval& parameter(std::int64_t i) const {
    return parameters_[static_cast<std::size_t>(i)];
  }
  /// Parameters that hold an element of `range`: indices [first, last). O(log n).
  [[nodiscard]] std::pair<std::int64_t, std::int64_t> parameters_in(const Interval& range) const;
  /// Elements of the buffer that belong to no parameter, ascending: gaps and the padded end.
  [[nodiscard]] std::vector<Interval> gaps() const;

 private:
  int shards_ = 1;
  int slices_ = 1;
  std::int64_t count_ = 0;
  std::int64_t used_ = 0;
  std::vector<Interval> parameters_;
};

}  // namespace mics::layout
