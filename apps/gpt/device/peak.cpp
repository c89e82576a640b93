// SPDX-License-Identifier: Apache-2.0
#include <Kokkos_Core.hpp>
#include <gpt/device/peak.hpp>
#include <gpt/device/products.hpp>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace gpt::device {

namespace {

// Between -1 and 1, from the element's number.
struct Fill {
  bf16* data;
  KOKKOS_FUNCTION void operator()(const std::int64_t i) const {
    std::uint32_t x = static_cast<std::uint32_t>(i) * 2654435761U;
    x ^= x >> 15;
    x *= 2246822519U;
    x ^= x >> 13;
    data[i] = bf16(static_cast<float>(x >> 8) * 0x1p-23F - 1.0F);
  }
};

}  // namespace

double measured_peak() {
  using Clock = std::chrono::steady_clock;
  constexpr int rounds = 4;
  constexpr int products_a_round = 8;
  constexpr std::int64_t n = peak_extent;
  const Exec exec;
  using Memory = Kokkos::View<bf16*, Exec::memory_space>;
  const Memory matrices(
      Kokkos::view_alloc("gpt::device::measured_peak", Kokkos::WithoutInitializing), 3 * n * n);
  const Kokkos::View<std::byte*, Exec::memory_space> workspace("gpt::device::measured_peak",
                                                               Products::workspace_bytes);
  Kokkos::parallel_for(
      "gpt::device::measured_peak",
      Kokkos::RangePolicy<Exec, Kokkos::IndexType<std::int64_t>>(exec, 0, 3 * n * n),
      Fill{matrices.data()});
  Products products(workspace.data());
  const Product product{.rows = peak_extent,
                        .columns = peak_extent,
                        .depth = peak_extent,
                        .transpose_b = Transpose::yes};
  const ProductArguments arguments{
      .a = matrices.data(), .b = matrices.data() + n * n, .d = matrices.data() + 2 * n * n};
  products.tune(exec, product, arguments);
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    exec.fence("gpt::device::measured_peak");
    const auto begin = Clock::now();
    for (int i = 0; i < products_a_round; ++i) products.run(exec, product, arguments);
    exec.fence("gpt::device::measured_peak");
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::max(best, 2.0 * n * n * n * products_a_round / seconds);
  }
  return best;
}

}  // namespace gpt::device
