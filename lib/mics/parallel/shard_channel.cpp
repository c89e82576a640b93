// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/parallel/shard_channel.hpp>

#include <cstddef>
#include <utility>

namespace mics::parallel {

/// Stage 2 needs the result of stage 1. On a device it is enqueued behind it; on the host, where
/// that would block, it runs in the first wait.
class ShardChannel::TwoStageGather final : public comm::PendingCollective {
 public:
  TwoStageGather(ShardChannel& channel, const void* shard, void* full, std::int64_t shard_bytes,
                 const comm::Operation& operation, const Execution& exec)
      : channel_(channel), full_(static_cast<std::byte*>(full)), operation_(operation) {
    lane_bytes_ = channel.inter_->size() * shard_bytes;
    stage1_ = channel.inter_->start_all_gather(shard, lane(), shard_bytes, operation, exec);
    if (channel.inter_->memory() == Memory::device) start_stage2();
  }
  void wait(const Execution& exec) override {
    if (stage2_ == nullptr) start_stage2();
    stage2_->wait(exec);
  }

 private:
  [[nodiscard]] std::byte* lane() const { return full_ + channel_.intra_->rank() * lane_bytes_; }
  void start_stage2() {
    const Execution& inside = channel_.intra_->execution();
    stage1_->wait(inside);
    stage2_ = channel_.intra_->start_all_gather(lane(), full_, lane_bytes_, operation_, inside);
  }

  ShardChannel& channel_;
  std::byte* full_;
  std::int64_t lane_bytes_ = 0;
  comm::Operation operation_;
  std::unique_ptr<comm::PendingCollective> stage1_;
  std::unique_ptr<comm::PendingCollective> stage2_;
};

ShardChannel::ShardChannel(std::unique_ptr<comm::Transport> flat) : flat_(std::move(flat)) {}

ShardChannel::ShardChannel(std::unique_ptr<comm::Transport> intra,
                           std::unique_ptr<comm::Transport> inter)
    : intra_(std::move(intra)), inter_(std::move(inter)) {}

std::unique_ptr<comm::PendingCollective> ShardChannel::start_gather(
    const void* shard, void* full, std::int64_t shard_bytes, const comm::Operation& operation,
    const Execution& exec) {
  if (!two_stage()) return flat_->start_all_gather(shard, full, shard_bytes, operation, exec);
  return std::make_unique<TwoStageGather>(*this, shard, full, shard_bytes, operation, exec);
}

void ShardChannel::reduce(const void* full, void* shard, std::int64_t shard_count,
                          const comm::Reduction& reduction, DType between, void* scratch,
                          const comm::Operation& operation, const Execution& exec) {
  if (!two_stage()) {
    flat_->reduce_scatter(full, shard, shard_count, reduction, operation, exec);
    return;
  }
  const DType sums = scratch_dtype(reduction.wire, reduction.result);
  comm::Reduction inside = reduction;
  inside.result = sums;
  inside.mode = comm::SumMode::assign;
  intra_->reduce_scatter(full, scratch, inter_->size() * shard_count, inside, operation, exec);
  const comm::Reduction outside{.source = sums,
                                .wire = between,
                                .result = reduction.result,
                                .factor = 1,
                                .mode = reduction.mode};
  // The scratch is free for the next buffer's stage 1 when stage 2 has read it.
  const Execution& after = intra_->execution();
  inter_->reduce_scatter(scratch, shard, shard_count, outside, operation, after);
  if (!after.same_as(inter_->execution())) after.wait_for(inter_->end());
}

std::uint64_t ShardChannel::fingerprint() const {
  if (!two_stage()) return flat_->fingerprint();
  return hash_combine(intra_->fingerprint(), inter_->fingerprint());
}

}  // namespace mics::parallel
