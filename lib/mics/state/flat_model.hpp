// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/layout/flat_layout.hpp>
#include <mics/state/model.hpp>

#include <cstdint>
#include <string>
#include <vector>

namespace mics::state {

/// Parameters of one dtype and kind that travel together.
struct FlatBuffer {
  std::string name;  ///< `unit` or `unit:bf16:frozen` where a unit has several
  int unit = -1;     ///< -1: a persistent buffer, which holds parameters of several units
  DType dtype = DType::fp32;
  bool trainable = true;
  std::vector<ParameterId> parameters;
  layout::FlatLayout flat;  ///< parameter i of the layout is parameters[i]

  [[nodiscard]] bool persistent() const { return unit < 0; }
};

/// Where a parameter lies.
struct ParameterPlace {
  int buffer = -1;
  std::int64_t position = 0;  ///< its index in the buffer's layout
  layout::Interval range;     ///< its elements in the buffer
};

/// Which parameters stay gathered all the time because they are small: those of at most
/// `threshold` elements, first come, while their sum stays at most `model_threshold`.
struct Persistence {
  std::int64_t threshold = 0;
  std::int64_t model_threshold = INT64_MAX;
};

/// A model's parameters laid end to end in flat buffers: one per unit, dtype and kind, and one per
/// dtype and kind for the persistent ones. The same on every rank; holds no values.
class FlatModel {
 public:
  /// \param dtype   of parameters that name none
  /// \param shards  p; \param slices q
  FlatModel(const Model& model, DType dtype, int shards, int slices, Persistence persistence);

  [[nodiscard]] const std::vector<FlatBuffer>& buffers() const { return buffers_; }
  [[nodiscard]] const FlatBuffer& buffer(int index) const {
    return buffers_[static_cast<std::size_t>(index)];
  }
  [[nodiscard]] int buffer_count() const { return static_cast<int>(buffers_.size()); }
  [[nodiscard]] const ParameterPlace& place(ParameterId parameter) const {
    return places_[static_cast<std::size_t>(parameter.value)];
  }
  /// The buffers that belong to a unit alone.
  [[nodiscard]] const std::vector<int>& buffers_of(UnitId unit) const {
    return of_unit_[static_cast<std::size_t>(unit.value)];
  }
  [[nodiscard]] const std::vector<int>& persistent_buffers() const { return persistent_; }
  /// Bytes of the gathered parameters of a unit in one slot, each buffer aligned.
  [[nodiscard]] std::int64_t gathered_bytes(UnitId unit) const;

 private:
  std::vector<FlatBuffer> buffers_;
  std::vector<ParameterPlace> places_;
  std::vector<std::vector<int>> of_unit_;
  std::vector<int> persistent_;
};

/// A run of elements with the same hyper-parameters, in elements of a shard: what the optimizer
/// kernels read instead of a table a tensor. Neighbours that agree are merged; gaps join either.
struct HyperRun {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  double weight_decay_factor = 1;
  double learning_rate_factor = 1;
};

/// The runs of `range` (elements of `buffer`), relative to its start, ascending, without holes.
[[nodiscard]] std::vector<HyperRun> hyper_runs(const Model& model, const FlatBuffer& buffer,
                                               const layout::Interval& range);

/// The part of one tensor that lies in a shard, in elements of the shard.
struct TensorSegment {
  std::int64_t begin = 0;
  std::int64_t end = 0;
  std::int64_t tensor = 0;  ///< its index in the buffer's layout
};

/// The tensors that have elements in `range` (elements of `buffer`), relative to its start,
/// ascending; none for gaps.
[[nodiscard]] std::vector<TensorSegment> tensor_segments(const FlatBuffer& buffer,
                                                         const layout::Interval& range);

}  // namespace mics::state
