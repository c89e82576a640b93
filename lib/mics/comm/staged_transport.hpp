// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/comm/transport.hpp>

#include <Kokkos_Core.hpp>

#include <cstddef>
#include <memory>

namespace mics::comm {

/// Collectives over device memory through pinned host buffers and MPI: where there is no NCCL, or
/// several ranks share a device. The bits are those of MpiTransport.
///
/// Every call blocks the host from the copy out of the device until MPI is done; the copy back is
/// ordered in `execution()`. A gather is complete when its start returns, so that gathers do not
/// overlap. Nothing is allocated after construction. Cost on top of MpiTransport: all bytes that go
/// in or come out cross the device's bus once. A group of one rank stays on the device.
class StagedTransport final : public Transport {
 public:
  /// Collective over the group of `host`; allocates pinned memory.
  /// \param exec      instance of device::Space in whose order copies run
  /// \param capacity  bytes of the largest call, by the functions below
  StagedTransport(std::unique_ptr<MpiTransport> host, Execution exec, std::int64_t capacity);

  [[nodiscard]] int rank() const override { return host_->rank(); }
  [[nodiscard]] int size() const override { return host_->size(); }
  [[nodiscard]] Memory memory() const override { return Memory::device; }
  [[nodiscard]] const Execution& execution() const override { return exec_; }
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

  [[nodiscard]] std::uint64_t fingerprint() const override { return host_->fingerprint(); }

  /// Bytes of pinned memory that a call needs in a group of `size` ranks.
  [[nodiscard]] static constexpr std::int64_t all_gather_bytes(int size, std::int64_t bytes) {
    return size == 1 ? 0 : size * bytes;
  }
  [[nodiscard]] static constexpr std::int64_t reduce_scatter_bytes(int size, std::int64_t count,
                                                                   const Reduction& reduction) {
    if (size == 1) return 0;
    return aligned(size * count * bytes_of(reduction.source)) + count * bytes_of(reduction.result);
  }
  [[nodiscard]] static constexpr std::int64_t all_reduce_bytes(int size, std::int64_t count,
                                                               const Reduction& reduction) {
    return size == 1 ? 0 : count * bytes_of(reduction.source);
  }

 private:
  class PendingGather;

  [[nodiscard]] static constexpr std::int64_t aligned(std::int64_t bytes) {
    return (bytes + 63) / 64 * 64;
  }
  // The buffers, once the copy before has left them; later copies come after the work of `exec`.
  std::byte* enter(std::int64_t bytes, const Operation& operation, const Execution& exec);

  std::unique_ptr<MpiTransport> host_;
  Execution exec_;
  Kokkos::View<std::byte*, device::PinnedSpace> buffer_;
  Marker last_copy_;  // back to the device
};

}  // namespace mics::comm
