// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>
#include <mics/base/dtype.hpp>
#include <mics/comm/operation_log.hpp>

#include <cstdint>
#include <memory>
#include <string_view>

namespace mics::comm {

/// Who moves the bytes.
enum class TransportKind : std::uint8_t {
  mpi,     ///< host memory, by messages
  nccl,    ///< device memory
  staged,  ///< device memory, through pinned memory of the host and messages
};

/// `MPI`, `NCCL` or `MPI, staged`.
[[nodiscard]] constexpr std::string_view name(TransportKind kind) {
  switch (kind) {
    case TransportKind::mpi:
      return "MPI";
    case TransportKind::nccl:
      return "NCCL";
    case TransportKind::staged:
      break;
  }
  return "MPI, staged";
}

/// What a reduction does with the values that are in the result already.
enum class SumMode : std::uint8_t {
  assign,  ///< result = sum over ranks
  add,     ///< result += sum over ranks
};

/// How a reduction treats its elements. Every addend is multiplied by `factor` and rounded to
/// `wire`, its own rank's too, so that a result does not depend on who computed it; sums run in
/// rank order in fp64 if `wire` or `result` is fp64, else in fp32, and are rounded once to
/// `result`. A group of one rank has no wire: nothing is rounded to it.
struct Reduction {
  DType source = DType::fp32;  ///< of the elements that go in
  DType wire = DType::fp32;    ///< of the messages
  DType result = DType::fp32;  ///< of the sums; may have 16 bits
  double factor = 1;
  SumMode mode = SumMode::assign;

  /// True if elements change on their way to the wire.
  [[nodiscard]] constexpr bool converts() const { return source != wire || factor != 1; }
};

/// A collective under way. Destroying one that was not waited for abandons it: its buffers must
/// then not be used again by this process (the failure path).
class PendingCollective {
 public:
  virtual ~PendingCollective() = default;
  /// Later work of `exec` sees the result. May be called again, for another instance. Blocks the
  /// host on a transport of host memory. Data never becomes available after an error.
  /// \throws CommError
  virtual void wait(const Execution& exec) = 0;
};

/// Collectives of one group of ranks. Every call is collective over the group, made by all its
/// ranks in the same order with the same sizes, and is ordered after the work of `exec` before it.
/// Counts are 64-bit. \throws CommError if MPI, NCCL or a peer fails, or no answer comes within the
/// time limit.
///
/// Send and receive buffers lie in memory that the transport reaches: `memory()` says which. A
/// transport works in the order of its own instance, `execution()`: a call whose `exec` is that
/// instance needs no other ordering, and what a reduction wrote is ready for work that is ordered
/// after it. On host memory calls block until their result is there; on device memory they only
/// enqueue.
class Transport {
 public:
  virtual ~Transport() = default;

  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int size() const = 0;
  [[nodiscard]] virtual Memory memory() const = 0;
  /// The instance in whose order collectives run.
  [[nodiscard]] virtual const Execution& execution() const = 0;
  /// The point in that order after all operations so far. Local; does not block.
  [[nodiscard]] virtual Marker end() const { return execution().mark(); }

  /// Starts putting every rank's `bytes` bytes, in rank order, into `receive` of all.
  /// `send` may be this rank's place in `receive` (in place) and must not change until the wait.
  [[nodiscard]] virtual std::unique_ptr<PendingCollective> start_all_gather(
      const void* send, void* receive, std::int64_t bytes, const Operation& operation,
      const Execution& exec) = 0;

  /// `start_all_gather` and the wait for it.
  void all_gather(const void* send, void* receive, std::int64_t bytes, const Operation& operation,
                  const Execution& exec) {
    start_all_gather(send, receive, bytes, operation, exec)->wait(exec);
  }

  /// Sums piece `rank()` of all ranks' `send` (size() pieces of `count` elements) into `result`.
  virtual void reduce_scatter(const void* send, void* result, std::int64_t count,
                              const Reduction& reduction, const Operation& operation,
                              const Execution& exec) = 0;

  /// Replaces `data`, `count` elements of `source`, which is also `result`, by the sums; the same
  /// bits on all ranks: what a sum loses in the wire dtype on its way to the others, the rank that
  /// computed it gives up too. `mode` is assign.
  virtual void all_reduce(void* data, std::int64_t count, const Reduction& reduction,
                          const Operation& operation, const Execution& exec) = 0;

  /// Gathers a few bytes of host memory from every rank, in a logarithmic number of messages.
  virtual void all_gather_small(const void* send, void* receive, std::int64_t bytes,
                                const Operation& operation) = 0;

  /// Copies `bytes` bytes of host memory from `root` to all.
  virtual void broadcast(void* data, std::int64_t bytes, int root, const Operation& operation) = 0;

  /// Returns when every rank has entered.
  virtual void barrier(const Operation& operation) = 0;

  /// A hash of all operations of this group so far, in their order: equal on all its ranks.
  [[nodiscard]] virtual std::uint64_t fingerprint() const = 0;
};

}  // namespace mics::comm
