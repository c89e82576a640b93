// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/layout/group_layout.hpp>
#include <mics/state/flat_model.hpp>
#include <mics/state/model.hpp>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mics {

/// What a plan is made from beside the model and the ranks.
struct PlanRequest {
  std::string preset;  ///< its name, for the text
  DType compute = DType::fp32;
  DType master = DType::fp32;            ///< of parameters that are not fp64
  std::optional<DType> gradient = {};    ///< of gradient views; default: the parameter's
  std::optional<DType> wire = {};        ///< of both hops; default: gradient, then accumulator
  std::optional<DType> accumulate = {};  ///< default: fp32
  double predivide = 1;                  ///< gradients are divided by it before hop 1
  int states = 2;             ///< arrays of the optimizer, each as large as the master weights
  bool tensor_norms = false;  ///< the optimizer needs norms of whole tensors
  std::string optimizer = "AdamW";
  bool keep_gathered = false;  ///< gathered once a step and kept (ddp, zero2)
  bool want_two_stage = true;
  bool require_two_stage = false;
  int slots = 2;
  int prefetch = 1;
  bool debug = false;
  int micro_steps = 1;  ///< of the printed counts
  state::Persistence persistence;
};

/// Collectives that one rank takes part in during a step.
struct CollectiveCounts {
  std::int64_t gather = 0;
  std::int64_t hop1 = 0;
  std::int64_t hop2 = 0;
  std::int64_t norm = 0;
  friend bool operator==(const CollectiveCounts&, const CollectiveCounts&) = default;
};

/// A call of a pass that begins or ends a lease on a unit.
struct LeaseCall {
  UnitId unit;
  bool begins = true;
};

/// Bytes of one rank, by purpose. All but `staging` lie in the arena.
struct MemoryPlan {
  std::int64_t compute_shards = 0;
  std::int64_t master_weights = 0;  ///< 0 where the compute shard is the master
  std::int64_t optimizer_states = 0;
  std::int64_t accumulators = 0;
  std::int64_t gather_slots = 0;
  std::int64_t gradient_slots = 0;
  std::int64_t resident = 0;  ///< buffers that stay gathered, with their gradients
  std::int64_t scratch = 0;
  std::int64_t arena = 0;    ///< sum of the above
  std::int64_t staging = 0;  ///< of the transport
  [[nodiscard]] std::int64_t total() const { return arena + staging; }
};

/// Everything that is decided before the first byte is allocated: groups, buffers, memory,
/// collectives. Made by arithmetic alone, without communication, for any number of ranks.
class Plan {
 public:
  /// Local. \throws ArgumentError if p does not divide W, or two stages are required and impossible
  Plan(const Model& model, const layout::GroupLayout& layout, const PlanRequest& request);

  [[nodiscard]] const state::FlatModel& flat() const { return flat_; }
  [[nodiscard]] const layout::GroupLayout& layout() const { return layout_; }
  [[nodiscard]] const PlanRequest& request() const { return request_; }
  [[nodiscard]] const MemoryPlan& memory() const { return memory_; }
  [[nodiscard]] bool two_stage() const { return two_stage_; }
  /// True if `buffer` is gathered all the time: persistent, kept, or whole on every rank.
  [[nodiscard]] bool resident(int buffer) const;
  /// True if the compute shard is also the master copy.
  [[nodiscard]] bool master_is_compute(int buffer) const;
  [[nodiscard]] DType master_dtype(int buffer) const;
  [[nodiscard]] DType gradient_dtype(int buffer) const;
  /// Of the accumulator, which has the dtype of the sums over the shard group and micro-steps.
  [[nodiscard]] DType sum_dtype(int buffer) const;
  [[nodiscard]] DType hop1_wire(int buffer) const;
  /// Of the second stage of hop 1, between nodes.
  [[nodiscard]] DType between_wire(int buffer) const;
  [[nodiscard]] DType hop2_wire(int buffer) const;
  /// What every addend of hop 1 and of hop 2 is multiplied by before it is rounded, so that 16-bit
  /// sums overflow only where the mean would; the optimizer divides by the product.
  [[nodiscard]] double hop1_factor(int buffer) const;
  [[nodiscard]] double hop2_factor(int buffer) const;
  /// Bytes of the gradients of a unit in one slot.
  [[nodiscard]] std::int64_t gradient_bytes(UnitId unit) const;
  [[nodiscard]] std::int64_t gather_slot_bytes() const { return gather_slot_bytes_; }
  [[nodiscard]] std::int64_t gradient_slot_bytes() const { return gradient_slot_bytes_; }
  [[nodiscard]] std::int64_t scratch_bytes() const { return memory_.scratch; }
  /// Trainable buffers in the order in which backward passes finish them: hop 2 follows it.
  [[nodiscard]] const std::vector<int>& hop2_order() const { return hop2_order_; }
  /// Bytes of gradients of resident buffers of this rank, by buffer, in arena bytes.
  [[nodiscard]] bool has_resident_gradient(int buffer) const;

  /// Collectives of a steady-state step of `micro_steps` micro-steps, each of which makes `calls`
  /// and reduces every unit once.
  /// \throws ArgumentError if more leases are open at once than there are slots
  [[nodiscard]] CollectiveCounts count(std::span<const LeaseCall> calls, int micro_steps) const;
  /// The same for leases that follow one another: each unit of `order` is released before the next
  /// one is gathered. Leases that overlap keep slots from other units and may cost more gathers.
  [[nodiscard]] CollectiveCounts count(std::span<const UnitId> order, int micro_steps) const;
  /// `count` for a forward pass in the order of declaration and a backward pass in reverse.
  [[nodiscard]] CollectiveCounts count(int micro_steps) const;

  /// The plan as text for people, several lines. \param calls  of a micro-step; empty: one lease
  /// after another, forward in the order of declaration, backward in reverse
  [[nodiscard]] std::string text(std::span<const LeaseCall> calls = {}) const;

 private:
  // How many addends the factor of hop 1 makes room for.
  [[nodiscard]] double hop1_addends(int buffer) const;

  layout::GroupLayout layout_;
  PlanRequest request_;
  state::FlatModel flat_;
  std::int64_t model_count_ = 0;
  std::vector<bool> unit_needs_slot_;
  MemoryPlan memory_;
  bool two_stage_ = false;
  std::int64_t gather_slot_bytes_ = 0;
  std::int64_t gradient_slot_bytes_ = 0;
  std::vector<int> hop2_order_;
};

}  // namespace mics
