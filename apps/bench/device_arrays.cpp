// SPDX-License-Identifier: Apache-2.0
#include <bench/device_arrays.hpp>

namespace mics::apps::bench {
namespace {

struct Fill {
  gpt::device::bf16* data;
  float scale;
  KOKKOS_FUNCTION void operator()(const std::int64_t i) const {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 2654435761U;
    x ^= x >> 15;
    x *= 2246822519U;
    x ^= x >> 13;
    data[i] = gpt::device::bf16(scale * (static_cast<float>(x >> 8) * 0x1p-23F - 1.0F));
  }
};

}  // namespace

void fill_randomly(const gpt::device::Exec& exec, gpt::device::bf16* data, std::int64_t count,
                   float scale) {
  using Policy = Kokkos::RangePolicy<gpt::device::Exec, Kokkos::IndexType<std::int64_t>>;
  Kokkos::parallel_for("mics::bench::fill_randomly", Policy(exec, 0, count), Fill{data, scale});
}

}  // namespace mics::apps::bench
