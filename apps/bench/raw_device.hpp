// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mpi.h>

#include <cstdint>
#include <memory>

namespace mics::apps::bench {

/// The collective library and the device's memory without mics: a communicator over all ranks, one
/// stream, buffers of its own. bf16.
class RawDevice {
 public:
  /// Collective; allocates `buffers` of `bytes` on the device, `shards` of a rank's part of that,
  /// and two of 256 MiB. Blocks. What is enqueued takes one after the other: a buffer that is used
  /// again at once stays in the cache, which makes small collectives a twentieth faster.
  RawDevice(MPI_Comm world, std::int64_t bytes, int buffers = 1, int shards = 1);
  ~RawDevice();
  RawDevice(const RawDevice&) = delete;
  RawDevice& operator=(const RawDevice&) = delete;

  /// Enqueues one, from a shard to a buffer. \param bytes  of the gathered buffer
  void all_gather(std::int64_t bytes);
  /// Enqueues one, from a buffer to a shard. \param count  elements of the whole buffer
  void reduce_scatter(std::int64_t count);
  /// Enqueues one, in place in a buffer.
  void all_reduce(std::int64_t count);
  /// Blocks until all of them are done.
  void wait();
  /// Bytes read and written a second by a copy of 256 MiB within the device's memory. Blocks.
  [[nodiscard]] double copy_speed();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace mics::apps::bench
