// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/execution.hpp>
#include <mics/comm/communicator.hpp>

#include <atomic>
#include <functional>
#include <memory>
#include <string>

struct ncclComm;  // of nccl.h, which public headers do not need

namespace mics::comm {

/// Owns one communicator of NCCL (or RCCL) on the current device. Move-only.
///
/// It blocks the host, as NCCL's are by default: a nonblocking one starts a host thread a call.
/// All communicators of an engine are made up front by splitting one parent.
class NcclCommunicator {
 public:
  NcclCommunicator() = default;
  /// One communicator over all ranks of `world`, rank for rank. Sets NCCL_LAUNCH_ORDER_IMPLICIT=1
  /// in the environment unless it is set: several communicators may then be in use at once without
  /// waiting for each other in a circle. Collective over `world`; blocks.
  /// \throws CommError on all ranks alike if NCCL is older than 2.18 or refuses: two ranks on one
  /// device, no way between two of them
  [[nodiscard]] static NcclCommunicator create(const Communicator& world);
  /// One communicator per colour (not negative), ranks ordered by (key, rank). Collective over
  /// *this; blocks. \param max_ctas  thread blocks that its collectives use at most; 0: NCCL
  /// decides
  [[nodiscard]] NcclCommunicator split(int color, int key, int max_ctas = 0) const;

  NcclCommunicator(NcclCommunicator&&) noexcept = default;
  NcclCommunicator& operator=(NcclCommunicator&& other) noexcept;
  NcclCommunicator(const NcclCommunicator&) = delete;
  NcclCommunicator& operator=(const NcclCommunicator&) = delete;
  /// Waits for its collectives and frees it, which is collective. Does nothing for one that was
  /// moved from, aborted or abandoned.
  ~NcclCommunicator();

  /// What a communicator is used for.
  struct Uses {
    bool gathers = true;
    bool sums = true;      ///< reduce-scatter and all-reduce
    bool messages = true;  ///< between any two ranks
  };
  /// Does a little of what later calls do, and waits for it: first uses connect the ranks and
  /// allocate. Collective; allocates; blocks. \param exec  an instance of device::Space
  void warm_up(const Execution& exec, const Uses& uses) const;

  /// Ends all its collectives and frees it. From any thread; only the first call has an effect.
  /// Later uses throw. Local.
  void abort() noexcept;
  /// `abort` without the communicator: for a watch that may outlive it.
  [[nodiscard]] std::function<void()> abort_handle() const;
  /// Forgets it without freeing it, for the path on which the other ranks may be gone. Local.
  void abandon() noexcept;

  /// What went wrong in a collective under way, in NCCL's words; empty: nothing. Local; from any
  /// thread.
  [[nodiscard]] std::string async_error() const;
  [[nodiscard]] std::function<std::string()> async_error_handle() const;

  [[nodiscard]] bool is_null() const noexcept;
  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return size_; }

  /// Of the library that runs: `2.28.9`.
  [[nodiscard]] static std::string version();
  /// True if NCCL starts the work of several communicators in the order of the calls: 2.26 or newer
  /// and not switched off by NCCL_LAUNCH_ORDER_IMPLICIT=0. Else one stream must order them. What a
  /// program that used NCCL before had set by then cannot be seen here.
  [[nodiscard]] static bool orders_launches();

 private:
  struct State;
  friend class NcclCall;

  NcclCommunicator(ncclComm* handle, int rank, int size);

  std::shared_ptr<State> state_;
  int rank_ = 0;
  int size_ = 1;
};

/// Uses a communicator for the duration of some calls of NCCL: an abort from another thread waits
/// for their end, but not for long, since it is what ends calls that hang.
class NcclCall {
 public:
  /// Local. \throws CommError if it was aborted
  explicit NcclCall(const NcclCommunicator& comm);
  ~NcclCall();
  NcclCall(const NcclCall&) = delete;
  NcclCall& operator=(const NcclCall&) = delete;

  [[nodiscard]] ncclComm* native() const noexcept { return handle_; }

 private:
  std::shared_ptr<NcclCommunicator::State> state_;
  ncclComm* handle_ = nullptr;
};

namespace detail {

/// Throws CommError with NCCL's own texts if `status`, an ncclResult_t, is no success.
void check_nccl(int status, ncclComm* comm, std::string_view operation,
                std::source_location where = std::source_location::current());

}  // namespace detail

}  // namespace mics::comm
