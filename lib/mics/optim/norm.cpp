// SPDX-License-Identifier: Apache-2.0
#include <mics/base/vector_clones.hpp>
#include <mics/optim/detail/sum_of_squares.hpp>
#include <mics/optim/norm.hpp>
#include <mics/state/for_blocks.hpp>

namespace mics::optim {
namespace {

// Squares of these are exact in fp64, so that fused or not, in vectors or not, the sums have the
// same bits on every CPU.
MICS_VECTOR_CLONES double squares(const float* values, std::int64_t count) {
  return detail::sum_of_squares(values, count);
}
MICS_VECTOR_CLONES double squares(const bf16* values, std::int64_t count) {
  return detail::sum_of_squares(values, count);
}
MICS_VECTOR_CLONES double squares(const fp16* values, std::int64_t count) {
  return detail::sum_of_squares(values, count);
}
// These are rounded: compiled for one CPU, which may be without fused multiply-add.
double squares(const double* values, std::int64_t count) {
  return detail::sum_of_squares(values, count);
}

}  // namespace

double sum_of_squares(const void* values, DType dtype, std::int64_t count,
                      std::span<double> partials) {
  double* partial = partials.data();
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T* value = static_cast<const T*>(values);
    state::for_blocks("mics::optim::sum_of_squares", count,
                      [=](std::int64_t begin, std::int64_t end) {
                        partial[begin / state::block_count] = squares(value + begin, end - begin);
                      });
  });
  double total = 0;
  for (std::int64_t b = 0; b < state::blocks_of(count); ++b) total += partial[b];
  return total;
}

}  // namespace mics::optim
