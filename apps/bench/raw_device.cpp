// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/error.hpp>

#include <Kokkos_Core.hpp>
#include <bench/raw_device.hpp>
#include <nccl.h>

#include <algorithm>
#include <cstddef>
#include <string>

namespace mics::apps::bench {
namespace {

void require(ncclResult_t status, const char* call) {
  if (status == ncclSuccess) return;
  raise<CommError>({.object = call, .expected = "success", .found = ncclGetErrorString(status)});
}

int rank_in(MPI_Comm world) {
  int rank = 0;
  MPI_Comm_rank(world, &rank);
  return rank;
}

int size_of(MPI_Comm world) {
  int size = 1;
  MPI_Comm_size(world, &size);
  return size;
}

constexpr std::int64_t copy_bytes = std::int64_t{256} << 20;
constexpr int copies = 20;

}  // namespace

struct RawDevice::State {
  using Bytes = Kokkos::View<std::byte*, device::MemorySpace>;
  State(MPI_Comm world, std::int64_t bytes, int buffer_count, int shard_count)
      : exec(device::make_instance(true)),
        rank(rank_in(world)),
        size(size_of(world)),
        buffer_bytes(bytes),
        shard_bytes(std::max<std::int64_t>(1, bytes / size)),
        buffers("bench::buffers", static_cast<std::size_t>(buffer_count * bytes)),
        shards("bench::shards", static_cast<std::size_t>(shard_count * shard_bytes)),
        from("bench::from", static_cast<std::size_t>(copy_bytes)),
        to("bench::to", static_cast<std::size_t>(copy_bytes)) {
    ncclUniqueId id;
    if (rank == 0) require(ncclGetUniqueId(&id), "ncclGetUniqueId");
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, world);
    require(ncclCommInitRank(&comm, size, id, rank), "ncclCommInitRank");
  }
  [[nodiscard]] cudaStream_t stream() const { return static_cast<cudaStream_t>(exec.stream()); }

  // Those of the next collective.
  [[nodiscard]] std::byte* next_buffer() {
    const std::int64_t count = static_cast<std::int64_t>(buffers.size()) / buffer_bytes;
    return buffers.data() + (buffer_turn++ % count) * buffer_bytes;
  }
  [[nodiscard]] std::byte* next_shard() {
    const std::int64_t count = static_cast<std::int64_t>(shards.size()) / shard_bytes;
    return shards.data() + (shard_turn++ % count) * shard_bytes;
  }

  Execution exec;
  int rank;
  int size;
  std::int64_t buffer_bytes;
  std::int64_t shard_bytes;
  std::int64_t buffer_turn = 0;
  std::int64_t shard_turn = 0;
  Bytes buffers;
  Bytes shards;
  Bytes from;
  Bytes to;
  ncclComm_t comm = nullptr;
};

RawDevice::RawDevice(MPI_Comm world, std::int64_t bytes, int buffers, int shards)
    : state_(std::make_unique<State>(world, bytes, buffers, shards)) {}
RawDevice::~RawDevice() {
  state_->exec.fence("bench: the bare collectives are done");
  ncclCommDestroy(state_->comm);
}

void RawDevice::all_gather(std::int64_t bytes) {
  const auto piece = static_cast<std::size_t>(bytes / state_->size);
  require(ncclAllGather(state_->next_shard(), state_->next_buffer(), piece / 2, ncclBfloat16,
                        state_->comm, state_->stream()),
          "ncclAllGather");
}

void RawDevice::reduce_scatter(std::int64_t count) {
  const auto piece = static_cast<std::size_t>(count / state_->size);
  require(ncclReduceScatter(state_->next_buffer(), state_->next_shard(), piece, ncclBfloat16,
                            ncclSum, state_->comm, state_->stream()),
          "ncclReduceScatter");
}

void RawDevice::all_reduce(std::int64_t count) {
  std::byte* const data = state_->next_buffer();
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
