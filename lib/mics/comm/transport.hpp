// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/base/execution.hpp>
#include <mics/comm/operation_log.hpp>

#include <cstdint>
#include <memory>
#include <string_view>

namespace mics::comm {

/// What a reduction does with the values that are in the result already.
enum class SumMode : std::uint8_t {
  assign,  ///< result = sum over ranks
  add,     ///< result += sum over ranks
};

/// A collective under way. Destroying one that was not waited for abandons it: its buffers must
/// then not be used again by this process (the failure path).
class PendingCollective {
 public:
  virtual ~PendingCollective() = default;
  /// Completes the collective: later work of `exec` sees the result. Data never becomes available
  /// after an error. \throws CommError
  virtual void wait(const Execution& exec) = 0;
};

/// Collectives of one group of ranks. Every call is collective over the group, made by all its
/// ranks in the same order with the same sizes, and is ordered after the work of `exec` before it.
/// Counts are 64-bit. \throws CommError if MPI or a peer fails, or no answer comes within the time
/// limit.
///
/// Send and receive buffers lie in memory that the transport reaches: `memory()` says which.
class Transport {
 public:
  virtual ~Transport() = default;

  [[nodiscard]] virtual int rank() const = 0;
  [[nodiscard]] virtual int size() const = 0;
  /// "host" or "device".
  [[nodiscard]] virtual std::string_view memory() const = 0;

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

  /// Sums piece `rank()` of all ranks' `send` (size() pieces of `count` elements of `wire`), in
  /// rank order and in the arithmetic of `result_type` (fp32 or fp64), into `result`: one rounding,
  /// and the same bits whoever computes it.
  virtual void reduce_scatter(const void* send, DType wire, void* result, DType result_type,
                              std::int64_t count, SumMode mode, const Operation& operation,
                              const Execution& exec) = 0;

  /// Replaces `data` on all ranks by the sum in rank order; the same bits on all ranks.
  virtual void all_reduce(void* data, DType dtype, std::int64_t count, const Operation& operation,
                          const Execution& exec) = 0;

  /// Gathers a few bytes of host memory from every rank, in a logarithmic number of messages.
  virtual void all_gather_small(const void* send, void* receive, std::int64_t bytes,
                                const Operation& operation) = 0;

  /// Copies `bytes` bytes of host memory from `root` to all.
  virtual void broadcast(void* data, std::int64_t bytes, int root, const Operation& operation) = 0;

  /// Returns when every rank has entered.
  virtual void barrier(const Operation& operation) = 0;
};

}  // namespace mics::comm
