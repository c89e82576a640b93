// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/transport.hpp>

#include <cstdint>
#include <memory>

namespace mics::parallel {

/// Gathers and reduces whole buffers over a shard group, in one stage or in two.
///
/// Two stages, I nodes of g lanes, shard tau = lane * I + node:
///
///   gather   stage 1, between nodes: shards [lane*I, (lane+1)*I) to their final place
///            stage 2, inside the node: one in-place all-gather of I shards
///   reduce   stage 1, inside the node: reduce-scatter of I shards into `scratch`
///            stage 2, between nodes: reduce-scatter of one shard; in the dtype of the sums each
///            addend is still rounded only once
///
/// Bytes over a node's link for a buffer of M bytes: (p - g)/p * M instead of (p - 1)/p * M a rank
/// in a flat ring. Both give the same gathered bytes.
class ShardChannel {
 public:
  /// One stage. \param flat  ranks in the order of their shards
  explicit ShardChannel(std::unique_ptr<comm::Transport> flat);
  /// Two stages. \param intra  the g ranks of this node in lane order; \param inter  the I ranks of
  /// this lane in node order
  ShardChannel(std::unique_ptr<comm::Transport> intra, std::unique_ptr<comm::Transport> inter);

  [[nodiscard]] bool two_stage() const { return flat_ == nullptr; }
  /// The instance in whose order calls start: the first stage's.
  [[nodiscard]] const Execution& start_of_gather() const {
    return two_stage() ? inter_->execution() : flat_->execution();
  }
  [[nodiscard]] const Execution& end_of_gather() const {
    return two_stage() ? intra_->execution() : flat_->execution();
  }
  [[nodiscard]] const Execution& start_of_reduce() const {
    return two_stage() ? intra_->execution() : flat_->execution();
  }
  /// The instance in whose order results of `reduce` are ready: the last stage's.
  [[nodiscard]] const Execution& end_of_reduce() const {
    return two_stage() ? inter_->execution() : flat_->execution();
  }

  /// The point after which the gradients of all reductions so far have been read.
  [[nodiscard]] Marker gradients_read() const { return two_stage() ? intra_->end() : flat_->end(); }
  /// The point after which their results are ready.
  [[nodiscard]] Marker reduced() const { return two_stage() ? inter_->end() : flat_->end(); }

  /// Starts gathering `shard_bytes` bytes of every rank into `full`. Collective over the group.
  [[nodiscard]] std::unique_ptr<comm::PendingCollective> start_gather(
      const void* shard, void* full, std::int64_t shard_bytes, const comm::Operation& operation,
      const Execution& exec);

  /// Sums this rank's shard of all ranks' `full` into `shard`. Collective over the group; blocks.
  /// \param between  wire dtype of stage 2; \param scratch  scratch_bytes() bytes, aligned
  void reduce(const void* full, void* shard, std::int64_t shard_count,
              const comm::Reduction& reduction, DType between, void* scratch,
              const comm::Operation& operation, const Execution& exec);

  /// Dtype of the sums of stage 1.
  [[nodiscard]] static DType scratch_dtype(DType wire, DType result) {
    return wire == DType::fp64 || result == DType::fp64 ? DType::fp64 : DType::fp32;
  }
  /// Bytes of scratch that `reduce` needs.
  [[nodiscard]] static std::int64_t scratch_bytes(bool two_stage, int nodes,
                                                  std::int64_t shard_count, DType wire,
                                                  DType result) {
    return two_stage ? nodes * shard_count * bytes_of(scratch_dtype(wire, result)) : 0;
  }

  /// A hash of the group's operations so far, equal on all its ranks.
  [[nodiscard]] std::uint64_t fingerprint() const;

 private:
  class TwoStageGather;

  std::unique_ptr<comm::Transport> flat_;
  std::unique_ptr<comm::Transport> intra_;
  std::unique_ptr<comm::Transport> inter_;
};

}  // namespace mics::parallel
