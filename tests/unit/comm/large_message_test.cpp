// SPDX-License-Identifier: Apache-2.0
// Messages over 2^31 bytes: MPI counts are int.
#include "transport_fixture.hpp"
#include <mics/base/dtype.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>

#include <cstdint>

namespace mics::comm::test {
namespace {

using Bytes = Kokkos::View<std::uint64_t*, Kokkos::HostSpace>;

std::uint64_t word_of(int rank, std::int64_t i) {
  return static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15ULL + static_cast<std::uint64_t>(rank);
}

TEST(LargeMessage, GathersMoreThanTwoGibibytesFromEachOfTwoRanks) {
  ASSERT_EQ(job_size(), 2);
  // 2.1 GiB from each rank, in place: 4.2 GiB a rank, 8.4 GiB together.
  constexpr std::int64_t bytes = (std::int64_t{1} << 31) + (std::int64_t{100} << 20) + 8;
  constexpr std::int64_t words = bytes / 8;
  World world;
  const Bytes all(Kokkos::view_alloc(Kokkos::WithoutInitializing, "test::all"), 2 * words);
  std::uint64_t* const own = all.data() + job_rank() * words;
  for (std::int64_t i = 0; i < words; ++i) own[i] = word_of(job_rank(), i);

  world.transport.all_gather(own, all.data(), bytes, operation, {});

  std::int64_t differences = 0;
  for (int rank = 0; rank < 2; ++rank) {
    for (std::int64_t i = 0; i < words; ++i) {
      differences += all(rank * words + i) == word_of(rank, i) ? 0 : 1;
    }
  }
  EXPECT_EQ(differences, 0);
}

TEST(LargeMessage, ReducesABufferOfMoreThanTwoGibibytesOverTwoRanks) {
  ASSERT_EQ(job_size(), 2);
  // 2.1 GB to send and as much of sums on each rank: 8.6 GB together.
  constexpr std::int64_t count = (std::int64_t{1} << 29) + 1027;
  World world;
  const Kokkos::View<bf16*, Kokkos::HostSpace> send(
      Kokkos::view_alloc(Kokkos::WithoutInitializing, "test::send"), 2 * count);
  const Kokkos::View<float*, Kokkos::HostSpace> result("test::result", count);
  const auto value = [](int rank, std::int64_t i) {
    return static_cast<float>(i % 101 + 3 * rank);  // exact in bf16
  };
  for (std::int64_t i = 0; i < 2 * count; ++i) send(i) = bf16(value(job_rank(), i));

  world.transport.reduce_scatter(send.data(), result.data(), count,
                                 {.source = DType::bf16,
                                  .wire = DType::bf16,
                                  .result = DType::fp32,
                                  .factor = 1,
                                  .mode = SumMode::add},
                                 operation, {});

  std::int64_t differences = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t at = job_rank() * count + i;
    differences += result(i) == value(0, at) + value(1, at) ? 0 : 1;
  }
  EXPECT_EQ(differences, 0);
}

}  // namespace
}  // namespace mics::comm::test
