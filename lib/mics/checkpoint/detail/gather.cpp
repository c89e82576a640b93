// SPDX-License-Identifier: Apache-2.0
#include <mics/checkpoint/detail/gather.hpp>

#include <cstdint>

namespace mics::checkpoint::detail {

std::vector<std::vector<std::byte>> gather(const comm::Communicator& world,
                                           std::span<const std::byte> mine) {
  const auto size = static_cast<std::size_t>(world.size());
  const auto bytes = static_cast<std::int64_t>(mine.size());
  std::vector<std::int64_t> all(world.rank() == 0 ? size : 0);
  comm::check(MPI_Gather(&bytes, 1, MPI_INT64_T, all.data(), 1, MPI_INT64_T, 0, world.native()),
              "gathering what writers report");
  // Point to point, as the sum may be beyond what MPI counts.
  constexpr int tag = 0;
  std::vector<std::vector<std::byte>> received(all.size());
  if (world.rank() != 0) {
    comm::check(MPI_Send(mine.data(), static_cast<int>(bytes), MPI_BYTE, 0, tag, world.native()),
                "gathering what writers report");
    return received;
  }
  received[0].assign(mine.begin(), mine.end());
  for (std::size_t r = 1; r < size; ++r) {
    received[r].resize(static_cast<std::size_t>(all[r]));
    comm::check(MPI_Recv(received[r].data(), static_cast<int>(all[r]), MPI_BYTE,
                         static_cast<int>(r), tag, world.native(), MPI_STATUS_IGNORE),
                "gathering what writers report");
  }
  return received;
}

}  // namespace mics::checkpoint::detail
