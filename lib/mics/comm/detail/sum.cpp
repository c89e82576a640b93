// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/detail/sum.hpp>

#include <Kokkos_Core.hpp>

#include <algorithm>
#include <array>

namespace mics::comm::detail {
namespace {

// Partial sums of one block stay in registers and first-level cache while the sources stream by.
constexpr std::int64_t block = 2048;

template <class Wire, class Sum>
void sum_block(std::span<const void* const> sources, Sum* result, std::int64_t begin,
               std::int64_t end, SumMode mode) {
  std::array<Sum, block> partial;
  const std::int64_t n = end - begin;
  const Wire* first = static_cast<const Wire*>(sources[0]) + begin;
  for (std::int64_t i = 0; i < n; ++i)
    partial[static_cast<std::size_t>(i)] = static_cast<Sum>(first[i]);
  for (std::size_t s = 1; s < sources.size(); ++s) {
    const Wire* source = static_cast<const Wire*>(sources[s]) + begin;
    for (std::int64_t i = 0; i < n; ++i) {
      partial[static_cast<std::size_t>(i)] += static_cast<Sum>(source[i]);
    }
  }
  Sum* out = result + begin;
  if (mode == SumMode::assign) {
    for (std::int64_t i = 0; i < n; ++i) out[i] = partial[static_cast<std::size_t>(i)];
  } else {
    for (std::int64_t i = 0; i < n; ++i) out[i] += partial[static_cast<std::size_t>(i)];
  }
}

template <class Wire, class Sum>
void sum_typed(std::span<const void* const> sources, Sum* result, std::int64_t count,
               SumMode mode) {
  const std::int64_t blocks = (count + block - 1) / block;
  const auto body = [=](std::int64_t b) {
    sum_block<Wire>(sources, result, b * block, std::min(count, (b + 1) * block), mode);
  };
  using Host = Kokkos::DefaultHostExecutionSpace;
  if (blocks > 1 && Host().concurrency() > 1) {
    Kokkos::parallel_for("mics::comm::sum_in_order", Kokkos::RangePolicy<Host>(0, blocks), body);
    Kokkos::fence("mics::comm::sum_in_order: sums are complete before the staging is reused");
  } else {
    for (std::int64_t b = 0; b < blocks; ++b) body(b);
  }
}

}  // namespace

void sum_in_order(std::span<const void* const> sources, DType wire, void* result, DType result_type,
                  std::int64_t count, SumMode mode) {
  visit_arithmetic(result_type, [&](auto sum) {
    using Sum = typename decltype(sum)::type;
    visit(wire, [&](auto element) {
      using Wire = typename decltype(element)::type;
      sum_typed<Wire>(sources, static_cast<Sum*>(result), count, mode);
    });
  });
}

}  // namespace mics::comm::detail
