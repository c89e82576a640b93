// SPDX-License-Identifier: Apache-2.0
#include <mics/parallel/shard_channel.hpp>

#include <cstddef>
#include <utility>

namespace mics::parallel {

/// Stage 1 is under way from the start; stage 2 needs its result and runs in the wait.
class ShardChannel::TwoStageGather final : public comm::PendingCollective {
 public:
  TwoStageGather(ShardChannel& channel, const void* shard, void* full, std::int64_t shard_bytes,
                 const comm::Operation& operation, const Execution& exec)
      : channel_(channel), full_(static_cast<std::byte*>(full)), operation_(operation) {
    lane_bytes_ = channel.inter_->size() * shard_bytes;
    stage1_ = channel.inter_->start_all_gather(shard, lane(), shard_bytes, operation, exec);
  }
  void wait(const Execution& exec) override {
    stage1_->wait(exec);
    channel_.intra_->all_gather(lane(), full_, lane_bytes_, operation_, exec);
  }

 private:
  [[nodiscard]] std::byte* lane() const { return full_ + channel_.intra_->rank() * lane_bytes_; }

  ShardChannel& channel_;
  std::byte* full_;
  std::int64_t lane_bytes_ = 0;
  comm::Operation operation_;
  std::unique_ptr<comm::PendingCollective> stage1_;
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

void ShardChannel::reduce(const void* full, DType wire, void* shard, DType sum_type,
                          std::int64_t shard_count, comm::SumMode mode, void* scratch,
                          const comm::Operation& operation, const Execution& exec) {
  if (!two_stage()) {
    flat_->reduce_scatter(full, wire, shard, sum_type, shard_count, mode, operation, exec);
    return;
  }
  intra_->reduce_scatter(full, wire, scratch, sum_type, inter_->size() * shard_count,
                         comm::SumMode::assign, operation, exec);
  inter_->reduce_scatter(scratch, sum_type, shard, sum_type, shard_count, mode, operation, exec);
}

}  // namespace mics::parallel
