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

int size_of(MPI_Comm world) {
  int size = 1;
  MPI_Comm_size(world, &size);
  return size;
}

using Bytes = Kokkos::View<std::byte*, device::MemorySpace>;

// Parts of device memory that are used one after the other, round and round.
class Ring {
 public:
  Ring(const std::string& label, int parts, std::int64_t part_bytes)
      : parts_(parts),
        part_bytes_(part_bytes),
        memory_(label, static_cast<std::size_t>(parts * part_bytes)) {}
  [[nodiscard]] std::byte* next() { return memory_.data() + (turn_++ % parts_) * part_bytes_; }

 private:
  int parts_;
  std::int64_t part_bytes_;
  std::int64_t turn_ = 0;
  Bytes memory_;
};

constexpr std::int64_t copy_bytes = std::int64_t{256} << 20;
constexpr int copies = 20;

}  // namespace

struct RawDevice::State {
  State(MPI_Comm world, std::int64_t bytes, int buffer_count, int shard_count)
      : exec(device::make_instance(true)),
        size(size_of(world)),
        buffers("bench::buffers", buffer_count, bytes),
        shards("bench::shards", shard_count, bytes / size),
        from("bench::from", static_cast<std::size_t>(copy_bytes)),
        to("bench::to", static_cast<std::size_t>(copy_bytes)) {
    int rank = 0;
    MPI_Comm_rank(world, &rank);
    ncclUniqueId id;
    if (rank == 0) require(ncclGetUniqueId(&id), "ncclGetUniqueId");
    MPI_Bcast(&id, sizeof(id), MPI_BYTE, 0, world);
    require(ncclCommInitRank(&comm, size, id, rank), "ncclCommInitRank");
  }
  [[nodiscard]] cudaStream_t stream() const { return static_cast<cudaStream_t>(exec.stream()); }

  Execution exec;
  int size;
  Ring buffers;
  Ring shards;
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
  require(ncclAllGather(state_->shards.next(), state_->buffers.next(), piece / 2, ncclBfloat16,
                        state_->comm, state_->stream()),
          "ncclAllGather");
}

void RawDevice::reduce_scatter(std::int64_t count) {
  const auto piece = static_cast<std::size_t>(count / state_->size);
  require(ncclReduceScatter(state_->buffers.next(), state_->shards.next(), piece, ncclBfloat16,
                            ncclSum, state_->comm, state_->stream()),
          "ncclReduceScatter");
}

void RawDevice::all_reduce(std::int64_t count) {
  std::byte* const data = state_->buffers.next();
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
