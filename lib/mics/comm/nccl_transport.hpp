// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/comm/device_sums.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/comm/nccl_communicator.hpp>
#include <mics/comm/transport.hpp>

#include <cstddef>
#include <memory>
#include <optional>
#include <span>

namespace mics::comm {

/// Collectives over device memory by NCCL (or RCCL), in the order of one instance of the device.
///
/// Calls only enqueue: nothing blocks the host or allocates device memory after construction.
/// Exchanges of host memory go through MPI. Cost on top of the bare NCCL call: two event records,
/// one look for failures and, where dtypes or DeviceSums ask for it, one kernel before (a read of
/// `send` and a write in the wire dtype) and one after.
///
///   dtypes                              wire                         fp32
///   source == wire == result, assign    reduce-scatter into result   all-to-all, sum
///   source == wire, else                reduce-scatter, accumulate   all-to-all, sum
///   source != wire or factor != 1       the same after a conversion of all of `send`
///
/// A group of one rank uses no communicator: there its reductions are one kernel.
class NcclTransport final : public Transport {
 public:
  /// Collective over the group; allocates and blocks while NCCL makes its first connections.
  /// \param comm     the group, ranks as in `small`; may be null in a group of one rank
  /// \param small    the same group on host memory
  /// \param exec     instance of device::Space in whose order everything runs
  /// \param context  with a DeviceWatch
  /// \param staging  device memory at a multiple of 16 bytes that only work of `exec` uses
  /// \param uses     of `comm`: what it is not used for need not be connected now
  /// \param own_exec  `exec` is given nothing else but short kernels, so that what it waits for
  /// tells
  ///                  when an operation can begin; else each has one more marker before it
  NcclTransport(NcclCommunicator comm, std::unique_ptr<MpiTransport> small, Execution exec,
                TransportContext context, DeviceSums sums, std::span<std::byte> staging,
                const NcclCommunicator::Uses& uses = {}, bool own_exec = false);
  ~NcclTransport() override;

  [[nodiscard]] int rank() const override { return small_->rank(); }
  [[nodiscard]] int size() const override { return small_->size(); }
  [[nodiscard]] Memory memory() const override { return Memory::device; }
  [[nodiscard]] const Execution& execution() const override { return exec_; }
  [[nodiscard]] Marker end() const override;
  [[nodiscard]] std::unique_ptr<PendingCollective> start_all_gather(const void* send, void* receive,
                                                                    std::int64_t bytes,
                                                                    const Operation& operation,
                                                                    const Execution& exec) override;
  /// `result` may be this rank's place in `send` where the dtypes are the same.
  void reduce_scatter(const void* send, void* result, std::int64_t count,
                      const Reduction& reduction, const Operation& operation,
                      const Execution& exec) override;
  void all_reduce(void* data, std::int64_t count, const Reduction& reduction,
                  const Operation& operation, const Execution& exec) override;
  void all_gather_small(const void* send, void* receive, std::int64_t bytes,
                        const Operation& operation) override;
  void broadcast(void* data, std::int64_t bytes, int root, const Operation& operation) override;
  void barrier(const Operation& operation) override;

  [[nodiscard]] std::uint64_t fingerprint() const override;

  /// Bytes of `staging` that reductions need: `reduce_scatter_staging_bytes`.
  [[nodiscard]] static std::int64_t staging_bytes(int size, std::int64_t count,
                                                  const Reduction& reduction, DeviceSums sums) {
    return reduce_scatter_staging_bytes(size, count, reduction, sums);
  }

 private:
  class PendingGather;
  class Watched;

  // What every operation begins with: failures, the fingerprint, the order after `exec`.
  void enter(const Operation& operation, const Execution& exec);
  void require_staging(std::int64_t bytes, const Operation& operation) const;
  // Throws where `status`, an ncclResult_t, is no success; the engine has failed then.
  void check(int status, const Watched& watched, std::string_view call);
  // `elements` as they travel: themselves, or converted at the start of the staging memory.
  const void* on_the_wire(const void* elements, std::int64_t count, const Reduction& reduction);
  // One round of messages with every other rank.
  template <class SendAndReceive>
  void exchange(const Operation& operation, const SendAndReceive& with);
  void reduce_scatter_by_nccl(const void* send, void* result, std::int64_t count,
                              const Reduction& reduction, const Operation& operation);
  void reduce_scatter_in_order(const void* send, void* result, std::int64_t count,
                               const Reduction& reduction, const Operation& operation);
  void all_reduce_by_nccl(void* data, std::int64_t count, const Reduction& reduction,
                          const Operation& operation);
  void all_reduce_in_order(void* data, std::int64_t count, const Reduction& reduction,
                           const Operation& operation);
  [[nodiscard]] void* stream() const { return exec_.stream(); }

  NcclCommunicator comm_;
  std::unique_ptr<MpiTransport> small_;
  Execution exec_;
  TransportContext context_;
  DeviceSums sums_;
  std::span<std::byte> staging_;
  int member_ = -1;
  std::uint64_t history_ = 0;
  bool own_exec_;
  mutable std::optional<Marker> end_;  // of the last operation, while nothing follows it
};

}  // namespace mics::comm
