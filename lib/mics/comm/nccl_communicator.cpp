// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/vendor.hpp>
#include <mics/comm/agreement.hpp>
#include <mics/comm/nccl_communicator.hpp>

#include <Kokkos_Core.hpp>
#include <nccl.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <thread>
#include <utility>

namespace mics::comm {
namespace {

constexpr int oldest_version = 21800;    // communicators can be split
constexpr int ordering_version = 22600;  // knows NCCL_LAUNCH_ORDER_IMPLICIT
constexpr const char* order_variable = "NCCL_LAUNCH_ORDER_IMPLICIT";
// Calls of NCCL take microseconds; one that takes so long hangs.
constexpr std::chrono::seconds longest_call{1};
// Of warm-ups: below and above the sizes at which NCCL changes its protocol on a node.
constexpr std::int64_t warm_up_bytes[] = {1 << 10, 1 << 18, 1 << 24};

std::string text_of_version(int version) {
  return std::to_string(version / 10000) + '.' + std::to_string(version / 100 % 100) + '.' +
         std::to_string(version % 100);
}

int run_time_version() {
  int version = 0;
  detail::check_nccl(ncclGetVersion(&version), nullptr, "ncclGetVersion");
  return version;
}

std::string words(ncclResult_t status, ncclComm_t comm) {
  std::string text = ncclGetErrorString(status);
  const char* const last = ncclGetLastError(comm);
  if (last != nullptr && *last != '\0') text += ": " + std::string(last);
  return text;
}

}  // namespace

namespace detail {

void check_nccl(int status, ncclComm* comm, std::string_view operation,
                std::source_location where) {
  if (status == ncclSuccess) return;
  raise<CommError>({.object = std::string(operation),
                    .expected = "ncclSuccess",
                    .found = in_quotes(words(static_cast<ncclResult_t>(status), comm)),
                    .remedy = "NCCL_DEBUG=WARN makes NCCL " + text_of_version([] {
                                int version = 0;
                                ncclGetVersion(&version);
                                return version;
                              }()) +
                              " say more"},
                   where);
}

}  // namespace detail

struct NcclCommunicator::State {
  std::atomic<ncclComm*> handle = nullptr;
  std::atomic<int> in_use = 0;

  void abort() noexcept {
    ncclComm* const taken = handle.exchange(nullptr);
    if (taken == nullptr) return;
    const auto end = std::chrono::steady_clock::now() + longest_call;
    while (in_use > 0 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    static_cast<void>(ncclCommAbort(taken));
  }
  // Enters before it looks, so that an abort either sees the use or is seen.
  ncclComm* use() noexcept {
    ++in_use;
    ncclComm* const found = handle;
    if (found == nullptr) --in_use;
    return found;
  }
  std::string async_error() {
    ncclComm* const comm = use();
    if (comm == nullptr) return {};
    ncclResult_t found = ncclSuccess;
    const ncclResult_t status = ncclCommGetAsyncError(comm, &found);
    const ncclResult_t worse = status != ncclSuccess ? status : found;
    std::string text;
    if (worse != ncclSuccess && worse != ncclInProgress) text = in_quotes(words(worse, comm));
    --in_use;
    return text;
  }
};

NcclCommunicator::NcclCommunicator(ncclComm* handle, int rank, int size)
    : state_(std::make_shared<State>()), rank_(rank), size_(size) {
  state_->handle = handle;
}

NcclCommunicator NcclCommunicator::create(const Communicator& world) {
  ncclUniqueId id{};
  agree(world, [&] {
    const int version = run_time_version();
    if (version < oldest_version) {
      raise<CommError>({.object = "NCCL of rank " + std::to_string(world.rank()),
                        .expected = "version " + text_of_version(oldest_version) + " or newer",
                        .found = text_of_version(version),
                        .remedy = "load a newer libnccl, or keep the state in host memory"});
    }
    if (std::getenv(order_variable) == nullptr) setenv(order_variable, "1", 0);
    if (world.rank() == 0) detail::check_nccl(ncclGetUniqueId(&id), nullptr, "ncclGetUniqueId");
  });
  // Different libraries in one communicator are NCCL's most frequent cause of hangs.
  require_same(world, version(), "version of NCCL");
  check(MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, world.native()), "broadcast of NCCL's unique id");
  ncclComm_t handle = nullptr;
  agree(world, [&] {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 1;
    detail::check_nccl(ncclCommInitRankConfig(&handle, world.size(), id, world.rank(), &config),
                       nullptr,
                       "ncclCommInitRankConfig of rank " + std::to_string(world.rank()) +
                           " on device " + device::identity());
  });
  return {handle, world.rank(), world.size()};
}

NcclCommunicator NcclCommunicator::split(int color, int key, int max_ctas) const {
  const NcclCall call(*this);
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 1;
  if (max_ctas > 0) config.maxCTAs = max_ctas;
  ncclComm_t part = nullptr;
  detail::check_nccl(ncclCommSplit(call.native(), color, key, &part, &config), call.native(),
                     "ncclCommSplit");
  int rank = 0;
  int size = 0;
  detail::check_nccl(ncclCommUserRank(part, &rank), part, "ncclCommUserRank");
  detail::check_nccl(ncclCommCount(part, &size), part, "ncclCommCount");
  return {part, rank, size};
}

NcclCommunicator& NcclCommunicator::operator=(NcclCommunicator&& other) noexcept {
  NcclCommunicator moved(std::move(other));  // ends with what was here, and frees it now
  std::swap(state_, moved.state_);
  std::swap(rank_, moved.rank_);
  std::swap(size_, moved.size_);
  return *this;
}

NcclCommunicator::~NcclCommunicator() {
  if (state_ == nullptr) return;
  ncclComm* const taken = state_->handle.exchange(nullptr);
  if (taken == nullptr) return;
  static_cast<void>(ncclCommFinalize(taken));
  static_cast<void>(ncclCommDestroy(taken));
}

void NcclCommunicator::abort() noexcept {
  if (state_ != nullptr) state_->abort();
}

std::function<void()> NcclCommunicator::abort_handle() const {
  return [state = state_] { state->abort(); };
}

void NcclCommunicator::abandon() noexcept {
  if (state_ != nullptr) state_->handle = nullptr;
}

std::string NcclCommunicator::async_error() const {
  return state_ == nullptr ? std::string() : state_->async_error();
}

std::function<std::string()> NcclCommunicator::async_error_handle() const {
  return [state = state_] { return state->async_error(); };
}

bool NcclCommunicator::is_null() const noexcept {
  return state_ == nullptr || state_->handle == nullptr;
}

std::string NcclCommunicator::version() { return text_of_version(run_time_version()); }

bool NcclCommunicator::orders_launches() {
  const char* const set = std::getenv(order_variable);
  return run_time_version() >= ordering_version && (set == nullptr || std::string_view(set) != "0");
}

void NcclCommunicator::warm_up(const Execution& exec, const Uses& uses) const {
  const NcclCall call(*this);
  ncclComm_t const comm = call.native();
  auto* const stream = static_cast<MICS_VENDOR(Stream_t)>(exec.stream());
  const auto size = static_cast<std::size_t>(size_);
  const std::int64_t largest = warm_up_bytes[std::size(warm_up_bytes) - 1];
  const Kokkos::View<std::byte*, device::MemorySpace> memory(
      Kokkos::view_alloc("mics::comm::NcclCommunicator::warm_up", Kokkos::WithoutInitializing),
      static_cast<std::size_t>(largest));
  std::byte* const data = memory.data();
  device::clear(exec, data, largest);
  for (const std::int64_t bytes : warm_up_bytes) {
    const std::size_t piece = static_cast<std::size_t>(bytes) / size / 64 * 64;
    if (piece == 0) continue;
    const auto place = static_cast<std::size_t>(rank_) * piece;
    if (uses.gathers) {
      detail::check_nccl(ncclAllGather(data + place, data, piece, ncclInt8, comm, stream), comm,
                         "ncclAllGather");
    }
    if (!uses.sums) continue;
    for (const auto& [type, width] : {std::pair{ncclBfloat16, 2}, std::pair{ncclFloat16, 2},
                                      std::pair{ncclFloat32, 4}, std::pair{ncclFloat64, 8}}) {
      const std::size_t count = piece / static_cast<std::size_t>(width);
      detail::check_nccl(ncclReduceScatter(data, data + place, count, type, ncclSum, comm, stream),
                         comm, "ncclReduceScatter");
      detail::check_nccl(ncclAllReduce(data, data, count * size, type, ncclSum, comm, stream), comm,
                         "ncclAllReduce");
    }
  }
  if (size_ > 1 && uses.messages) {
    const std::size_t piece = static_cast<std::size_t>(largest) / 2 / size / 64 * 64;
    std::byte* const received = data + largest / 2;
    detail::check_nccl(ncclGroupStart(), comm, "ncclGroupStart");
    for (int step = 1; step < size_; ++step) {
      const int to = (rank_ + step) % size_;
      const int from = (rank_ - step + size_) % size_;
      detail::check_nccl(
          ncclSend(data + static_cast<std::size_t>(to) * piece, piece, ncclInt8, to, comm, stream),
          comm, "ncclSend");
      detail::check_nccl(ncclRecv(received + static_cast<std::size_t>(from) * piece, piece,
                                  ncclInt8, from, comm, stream),
                         comm, "ncclRecv");
    }
    detail::check_nccl(ncclGroupEnd(), comm, "ncclGroupEnd");
  }
  exec.fence("mics::comm::NcclCommunicator::warm_up");
}

NcclCall::NcclCall(const NcclCommunicator& comm) : state_(comm.state_) {
  if (state_ != nullptr) handle_ = state_->use();
  if (handle_ == nullptr) {
    raise<CommError>({.object = "communicator of NCCL",
                      .expected = "one in use",
                      .found = "one that was aborted or never made"});
  }
}

NcclCall::~NcclCall() { --state_->in_use; }

}  // namespace mics::comm
