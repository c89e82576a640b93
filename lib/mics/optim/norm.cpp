// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/norm.hpp>
#include <mics/state/for_blocks.hpp>

#include <array>
#include <cstddef>

namespace mics::optim {

double sum_of_squares(const void* values, DType dtype, std::int64_t count,
                      std::span<double> partials) {
  double* partial = partials.data();
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* value = static_cast<const T*>(values);
    state::for_blocks("mics::optim::sum_of_squares", count,
                      [=](std::int64_t begin, std::int64_t end) {
                        // Eight running sums: a fixed order of additions that vector units can
                        // follow.
                        constexpr std::int64_t width = 8;
                        std::array<double, width> sums{};
                        std::int64_t i = begin;
                        for (; i + width <= end; i += width) {
                          for (std::int64_t j = 0; j < width; ++j) {
                            const auto x = static_cast<double>(value[i + j]);
                            sums[static_cast<std::size_t>(j)] += x * x;
                          }
                        }
                        for (; i < end; ++i) {
                          const auto x = static_cast<double>(value[i]);
                          sums[0] += x * x;
                        }
                        double sum = 0;
                        for (const double s : sums) sum += s;
                        partial[begin / state::block_count] = sum;
                      });
  });
  double total = 0;
  for (std::int64_t b = 0; b < state::blocks_of(count); ++b) total += partial[b];
  return total;
}

}  // namespace mics::optim
