// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>
#include <mics/base/dtype.hpp>
#include <mics/base/execution.hpp>
#include <mics/optim/device_step_info.hpp>
#include <mics/optim/loss_scaler.hpp>
#include <mics/optim/schedule.hpp>

#include <Kokkos_Core.hpp>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>
#include <vector>

namespace mics::optim {

/// What the decision of a step depends on, the same for all steps.
struct DeviceStepSettings {
  std::vector<double> factors;  ///< of each trainable buffer: its sums are this times too large
  int shards = 1;               ///< p
  int shard = 0;                ///< this rank's place in its shard group
  int replicas = 1;             ///< R
  int replica = 0;              ///< this rank's place in its replica group
  LossScaleConfig loss_scale = {};
  double gradient_clipping = 0;                ///< largest norm; 0: any
  std::array<double, 2> betas = {0.9, 0.999};  ///< where the rates of a step name none
  bool bias_correction = true;
};

/// What became of a step: plain data that the device writes.
struct StepOutcome {
  std::int64_t step = 0;     ///< steps taken so far, without skipped ones
  std::int64_t samples = 0;  ///< of all ranks
  double loss = 0;           ///< mean over the samples
  double gradient_norm = 0;  ///< before clipping
  double learning_rate = 0;
  double loss_scale = 0;                ///< of this step
  std::int32_t skipped = 0;             ///< 1: no sample, or no finite norm; nothing was updated
  std::int32_t overflow = 0;            ///< 1: a gradient is infinite or NaN
  std::int32_t scale_exhausted = 0;     ///< 1: the loss scale would have to fall below its minimum
  std::int32_t betas_out_of_range = 0;  ///< 1: the rates of this step have betas outside [0, 1)
  std::int32_t desync_shard = -1;       ///< first of the shard group with another history; -1: none
  std::int32_t desync_replica = -1;     ///< first of the replica group
};
static_assert(std::is_trivially_copyable_v<StepOutcome>);

/// Outcomes of the steps under way, in host memory that the device writes. An entry may be read
/// after the work that wrote it is done.
class OutcomeRing {
 public:
  OutcomeRing() = default;
  /// Local; allocates; blocks.
  OutcomeRing(int buffers, int slots);

  [[nodiscard]] const StepOutcome& outcome(int slot) const {
    return outcomes_(static_cast<std::size_t>(slot));
  }
  /// (buffers) 1 for each buffer that some rank contributed to.
  [[nodiscard]] std::span<const std::uint8_t> contributed(int slot) const {
    return {contributed_.data() + static_cast<std::size_t>(slot) * buffers_, buffers_};
  }

 private:
  friend class DeviceStep;
  std::size_t buffers_ = 0;
  Kokkos::View<StepOutcome*, device::PinnedSpace> outcomes_;
  Kokkos::View<std::uint8_t*, device::PinnedSpace> contributed_;
};

/// What a DeviceStep remembers from step to step: for checkpoints.
struct DeviceStepState {
  std::int64_t steps = 0;
  LossScaleState scaler = {};
  std::vector<std::int64_t> updates = {};  ///< of each trainable buffer
};

namespace detail {

/// The rates of one step on a device.
struct StepRate {
  double learning_rate = 0;
  double beta1 = 0;
  double beta2 = 0;
};
struct StepMemory;

}  // namespace detail

/// The part of a step that depends on whether it is skipped, decided by the device: norm, loss
/// scale, counts, rates, clipping. The host enqueues and never learns of it before the step's end.
///
/// A step is, in this order: begin(), add_squares() for each buffer, publish_group(), a sum
/// all-reduce of group_vector() over the shard group, fold_group(), a sum all-reduce of
/// replica_vector() over the replica group, decide(), and the optimizer's kernels, which follow
/// info(). A group of one does without its all-reduce. Each rank writes its own slot of a vector of
/// zeros, so that the sums are exact whatever their order; the slots are then added in their order
/// by all: every rank has the same bits.
///
/// All functions but the constructor, state() and restore() enqueue work in the instance of the
/// constructor, are local and do not block. Numbers are those of the step on a host, but that the
/// squares are added in another order.
class DeviceStep {
 public:
  /// Steps ahead that set_rates() can tell the device of.
  static constexpr std::int64_t rate_capacity = 4096;

  /// Bytes of device memory for so many trainable buffers, p and R.
  [[nodiscard]] static std::int64_t bytes(int buffers, int shards, int replicas);

  /// Blocks.
  /// \param memory  device memory, bytes() long, aligned to 256 bytes; used as long as this lives
  /// \param exec    an instance of device::Space
  /// \throws ArgumentError if the memory is too small
  DeviceStep(std::span<std::byte> memory, const Execution& exec,
             const DeviceStepSettings& settings);

  /// Device scalar that kernels add this rank's loss, a sum over its samples, to; zero after
  /// decide().
  [[nodiscard]] double* loss() const { return loss_; }
  /// Device scalar: the factor on the loss of the step that begins.
  [[nodiscard]] double* loss_scale() const { return loss_scale_; }
  /// Device memory: what the optimizer's kernels for a buffer read.
  [[nodiscard]] const DeviceStepInfo* info(int buffer) const { return infos_ + buffer; }

  /// Forgets the sums of the step before.
  void begin();
  /// Squares of the sums of a buffer, `count` elements in device memory; once a step. In fp64, in
  /// an order that depends on nothing but `count` and `dtype`; finite exactly if every element is
  /// and no square overflows fp64. Floor: one read of the elements.
  void add_squares(int buffer, const void* sums, DType dtype, std::int64_t count);
  /// Puts this rank's numbers into group_vector(), and what it contributed to into
  /// replica_vector(). \param history      a hash that must be the same on all ranks of the shard
  /// group \param contributed  (buffers) not 0 where this rank has a gradient; a buffer without
  /// elements
  ///                     counts as if it had none
  void publish_group(std::int64_t samples, std::uint64_t history,
                     std::span<const std::uint8_t> contributed);
  [[nodiscard]] double* group_vector() const { return group_; }
  [[nodiscard]] std::int64_t group_count() const;
  /// Adds the group up and puts its numbers into replica_vector().
  /// \param history  a hash that must be the same on all ranks of the replica group
  void fold_group(std::uint64_t history);
  [[nodiscard]] double* replica_vector() const { return replica_; }
  [[nodiscard]] std::int64_t replica_count() const;
  /// Decides the step, writes info() of all buffers and an entry of `outcomes`, and makes loss()
  /// and loss_scale() those of the next step. Histories that differ, a loss scale that is exhausted
  /// and betas that cannot be leave everything as it was before the step.
  /// \throws StateError if set_rates() was never called
  void decide(const OutcomeRing& outcomes, int slot);

  /// The rates of the steps `first`, `first + 1` and so on, which count as the learning-rate
  /// schedule counts; what was set for later steps is forgotten, and the last one stays. The steps
  /// under way may need rates before `first`: at most rate_capacity in all.
  /// Blocks only if the copy of the call before is still under way.
  /// \throws ArgumentError for none, or more than rate_capacity
  void set_rates(std::int64_t first, std::span<const Rates> rates);

  /// Blocks until all work of the instance is done.
  [[nodiscard]] DeviceStepState state() const;
  /// Goes on from a state that was saved. Blocks.
  void restore(const DeviceStepState& state);

 private:
  Execution exec_;
  DeviceStepSettings settings_;
  std::vector<std::int64_t> counts_;  // elements of each buffer in this step
  std::int64_t rates_end_ = 0;        // steps whose rates are known
  Kokkos::View<detail::StepRate*, device::PinnedSpace> staged_rates_;
  Marker staged_;

  // Device memory.
  detail::StepMemory* kept_ = nullptr;
  double* loss_ = nullptr;
  double* loss_scale_ = nullptr;
  double* factors_ = nullptr;
  std::int64_t* updates_ = nullptr;
  DeviceStepInfo* infos_ = nullptr;
  detail::StepRate* rates_ = nullptr;
  double* group_ = nullptr;
  double* replica_ = nullptr;
  double* squares_ = nullptr;
  double* partials_ = nullptr;
};

}  // namespace mics::optim
