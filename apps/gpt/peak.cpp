// SPDX-License-Identifier: Apache-2.0
#include <Kokkos_Core.hpp>
#include <gpt/gemm.hpp>
#include <gpt/peak.hpp>

#include <algorithm>
#include <chrono>
#include <vector>

namespace gpt {

template <class Real>
double measured_peak() {
  using Clock = std::chrono::steady_clock;
  constexpr int rounds = 4;  // the first one warms up too
  constexpr std::chrono::milliseconds round_time{25};
  constexpr auto n = static_cast<std::size_t>(peak_extent);
  const std::vector<Real> a(n * n, Real(1));
  const std::vector<Real> b(n * n, Real(1) / Real(peak_extent));
  std::vector<Real> c(n * n);
  const Kokkos::DefaultHostExecutionSpace exec;
  double best = 0;
  for (int round = 0; round < rounds; ++round) {
    const auto begin = Clock::now();
    int products = 0;
    do {
      gemm<Real>(exec, Transpose::no, Transpose::no, {peak_extent, peak_extent, peak_extent},
                 Real(1), {a.data(), peak_extent}, {b.data(), peak_extent}, Real(0),
                 {c.data(), peak_extent});
      ++products;
    } while (Clock::now() - begin < round_time);
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::max(best, 2.0 * n * n * n * products / seconds);
  }
  return best;
}

template double measured_peak<float>();
template double measured_peak<double>();

}  // namespace gpt
