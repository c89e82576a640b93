// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/error.hpp>

#include <Kokkos_Core.hpp>
#include <bench/raw_device.hpp>
#include <nccl.h>

#include <cstddef>
#include <string>

namespace mics::apps::bench {
namespace {

void require(ncclResult_t status, const char* call) {
  if (status == ncclSuccess) return;
  raise<CommError>({.object = call, .expected = "success", .found = ncclGetErrorString(status)});
}

constexpr std::int64_t copy_bytes = std::int64_t{256} << 20;
constexpr int copies = 20;

}  // namespace

struct RawDevice::State {
  using Bytes = Kokkos::View<std::byte*, device::MemorySpace>;
  State(MPI_Comm world, std::int64_t bytes)
      : exec(device::make_instance(true)),
        buffer("bench::buffer", static_cast<std::size_t>(bytes)),
        shard("bench::shard", static_cast<std::size_t>(bytes)),
        from("bench::from", static_cast<std::size_t>(copy_bytes)),
        to("bench::to", static_cast<std::size_t>(copy_bytes)) {
    MPI_Comm_rank(world, &rank);
    MPI_Comm_size(world, &size);
    ncclUniqueId id;
    if (rank == 0) require(ncclGetUniqueId(&id), "ncclGetUniqueId");
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, world);
    require(ncclCommInitRank(&comm, size, id, rank), "ncclCommInitRank");
  }
  [[nodiscard]] cudaStream_t stream() const { return static_cast<cudaStream_t>(exec.stream()); }

  Execution exec;
  Bytes buffer;
  Bytes shard;
  Bytes from;
  Bytes to;
  ncclComm_t comm = nullptr;
  int rank = 0;
  int size = 1;
};

RawDevice::RawDevice(MPI_Comm world, std::int64_t bytes)
    : state_(std::make_unique<State>(world, bytes)) {}
RawDevice::~RawDevice() {
  state_->exec.fence("bench: the bare collectives are done");
  ncclCommDestroy(state_->comm);
}

void RawDevice::all_gather(std::int64_t bytes) {
  const auto piece = static_cast<std::size_t>(bytes / state_->size);
  require(ncclAllGather(state_->shard.data(), state_->buffer.data(), piece / 2, ncclBfloat16,
                        state_->comm, state_->stream()),
          "ncclAllGather");
}

void RawDevice::reduce_scatter(std::int64_t count) {
  const auto piece = static_cast<std::size_t>(count / state_->size);
  std::byte* const data = state_->buffer.data();
  require(ncclReduceScatter(data, data + static_cast<std::size_t>(state_->rank) * piece * 2, piece,
                            ncclBfloat16, ncclSum, state_->comm, state_->stream()),
          "ncclReduceScatter");
}

void RawDevice::all_reduce(std::int64_t count) {
  std::byte* const data = state_->buffer.data();
  require(ncclAllReduce(data, data, static_cast<std::size_t>(count), ncclBfloat16, ncclSum,
                        state_->comm, state_->stream()),
          "ncclAllReduce");
}

void RawDevice::wait() { state_->exec.fence("bench: the bare collectives are done"); }

double RawDevice::copy_speed() {
  const auto copy = [&] {
    device::copy(state_->exec, state_->to.data(), state_->from.data(), copy_bytes);
  };
  copy();
  wait();
  const double start = MPI_Wtime();
  for (int i = 0; i < copies; ++i) copy();
  wait();
  return 2.0 * copies * static_cast<double>(copy_bytes) / (MPI_Wtime() - start);
}

}  // namespace mics::apps::bench
