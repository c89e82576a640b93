// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/execution.hpp>
#include <mics/comm/communicator.hpp>
#include <mics/comm/failure_channel.hpp>
#include <mics/comm/operation_log.hpp>
#include <mics/comm/transport.hpp>

#include <chrono>
#include <cstddef>
#include <memory>
#include <span>
#include <vector>

namespace mics::comm {

/// What all transports of one engine share. Local; outlives them.
struct TransportContext {
  FailureChannel* failures = nullptr;
  OperationLog* log = nullptr;
  std::chrono::milliseconds timeout{60'000};  ///< longest wait for a peer
};

/// Collectives over host memory, built of nonblocking point-to-point messages and one waiting loop.
///
/// The loop looks for failures of other ranks and at the clock, so that a rank which does not come
/// ends in an error that names it instead of a hang; a blocking MPI collective could not. Measured
/// on 2 cores of shared memory, the direct exchange also takes 0.76-0.90 of MPI_Allgather's time
/// from 1 MiB on at 4 ranks.
///
/// All-gathers go directly from every rank to every other where all ranks share one node or all lie
/// on different ones, else in a ring ordered by node, which crosses each link once per shard.
/// Reductions are an all-to-all in the wire dtype and a sum in rank order; floor: every byte of
/// `send` is read once and crosses the wire once, the received bytes are read from cache.
class MpiTransport final : public Transport {
 public:
  /// \param node_of_member  node label of each rank of the group, in rank order
  MpiTransport(Communicator comm, std::vector<int> node_of_member, TransportContext context);
  ~MpiTransport() override;

  [[nodiscard]] int rank() const override { return comm_.rank(); }
  [[nodiscard]] int size() const override { return comm_.size(); }
  [[nodiscard]] std::string_view memory() const override { return "host"; }
  [[nodiscard]] std::unique_ptr<PendingCollective> start_all_gather(const void* send, void* receive,
                                                                    std::int64_t bytes,
                                                                    const Operation& operation,
                                                                    const Execution& exec) override;
  void reduce_scatter(const void* send, void* result, std::int64_t count,
                      const Reduction& reduction, const Operation& operation,
                      const Execution& exec) override;
  void all_reduce(void* data, std::int64_t count, const Reduction& reduction,
                  const Operation& operation, const Execution& exec) override;
  void all_gather_small(const void* send, void* receive, std::int64_t bytes,
                        const Operation& operation) override;
  void broadcast(void* data, std::int64_t bytes, int root, const Operation& operation) override;
  void barrier(const Operation& operation) override;

  /// The bytes of every rank, any number of them each, in rank order on `root`; none elsewhere.
  /// Host memory. Collective as a Transport's functions are; a message for each rank.
  [[nodiscard]] std::vector<std::vector<std::byte>> gather(std::span<const std::byte> mine,
                                                           int root, const Operation& operation);

  [[nodiscard]] std::uint64_t fingerprint() const override { return history_; }

  /// Bytes of host memory that reductions use for pieces on their way in a group of `size` ranks.
  /// \param converts  Reduction::converts() of the widest
  [[nodiscard]] static std::int64_t staging_bytes(int size, bool converts);

 private:
  struct Piece {
    std::int64_t offset = 0;  // elements
    std::int64_t count = 0;
  };
  class Requests;
  class DirectGather;
  class RingGather;

  void take_tags();
  void name_members();
  int next_tag(const Operation& operation);
  // The bits of an operation's fingerprint that its tag holds.
  [[nodiscard]] std::uint64_t fingerprint_of(int tag) const {
    return static_cast<std::uint64_t>(tag / sequence_count_);
  }
  [[nodiscard]] int world_rank(int member) const {
    return world_ranks_[static_cast<std::size_t>(member)];
  }
  // All-to-all of `pieces` of `send` and the sum of piece rank() over the ranks into `result`.
  void exchange_and_sum(const void* send, void* result, const Reduction& reduction,
                        std::span<const Piece> pieces, const Operation& operation);
  void share_pieces(void* data, const Reduction& reduction, std::span<const Piece> pieces,
                    const Operation& operation);
  [[nodiscard]] std::int64_t chunk_bytes() const;

  Communicator comm_;
  TransportContext context_;
  std::vector<int> ring_;         // ranks in node order; empty where the direct exchange is used
  std::vector<int> world_ranks_;  // of the members
  int sequence_count_ = 0;        // a power of two
  int fingerprint_mask_ = 0;
  int sequence_ = 0;
  std::uint64_t history_ = 0;
  std::vector<std::byte> staging_;
};

}  // namespace mics::comm
