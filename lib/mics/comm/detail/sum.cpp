// SPDX-License-Identifier: Apache-2.0
#include <mics/base/host_blocks.hpp>
#include <mics/base/rounding.hpp>
#include <mics/comm/detail/sum.hpp>

#include <array>
#include <type_traits>

namespace mics::comm::detail {
namespace {

// Partial sums of one block stay in registers and first-level cache while the sources stream by.
constexpr std::int64_t block = 2048;

template <class Source, class Sum>
void add_block(const Source* source, Sum factor, Sum* partial, std::int64_t n) {
  if (factor == Sum{1}) {
    for (std::int64_t i = 0; i < n; ++i) partial[i] += static_cast<Sum>(source[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) partial[i] += static_cast<Sum>(source[i]) * factor;
  }
}

template <class Source, class Sum>
void load_block(const Source* source, Sum factor, Sum* partial, std::int64_t n) {
  if (factor == Sum{1}) {
    for (std::int64_t i = 0; i < n; ++i) partial[i] = static_cast<Sum>(source[i]);
  } else {
    for (std::int64_t i = 0; i < n; ++i) partial[i] = static_cast<Sum>(source[i]) * factor;
  }
}

template <class Source, class Sum, class Result>
void sum_typed(std::span<const void* const> sources, Sum factor, Result* result, std::int64_t count,
               SumMode mode) {
  for_host_blocks(
      "mics::comm::sum_in_order", count, block, [=](std::int64_t begin, std::int64_t end) {
        std::array<Sum, block> partial;
        const std::int64_t n = end - begin;
        load_block(static_cast<const Source*>(sources[0]) + begin, factor, partial.data(), n);
        for (std::size_t s = 1; s < sources.size(); ++s) {
          add_block(static_cast<const Source*>(sources[s]) + begin, factor, partial.data(), n);
        }
        Result* out = result + begin;
        if constexpr (std::is_same_v<Sum, Result>) {
          if (mode == SumMode::add) {
            for (std::int64_t i = 0; i < n; ++i) out[i] += partial[static_cast<std::size_t>(i)];
            return;
          }
        } else if (mode == SumMode::add) {
          for (std::int64_t i = 0; i < n; ++i) {
            const auto at = static_cast<std::size_t>(i);
            partial[at] = static_cast<Sum>(out[i]) + partial[at];
          }
        }
        round_all(partial.data(), out, n);
      });
}

// Calls `f` with the type in which elements of these dtypes are added.
template <class F>
void visit_sum(DType a, DType b, const F& f) {
  if (a == DType::fp64 || b == DType::fp64) {
    f(double{});
  } else {
    f(float{});
  }
}

}  // namespace

void sum_in_order(std::span<const void* const> sources, DType source_type, double factor,
                  void* result, DType result_type, std::int64_t count, SumMode mode) {
  visit_sum(source_type, result_type, [&](auto zero) {
    using Sum = decltype(zero);
    visit(source_type, [&](auto source) {
      using Source = typename decltype(source)::type;
      visit(result_type, [&](auto to) {
        using Result = typename decltype(to)::type;
        sum_typed<Source, Sum>(sources, static_cast<Sum>(factor), static_cast<Result*>(result),
                               count, mode);
      });
    });
  });
}

void convert(const void* from, DType from_type, double factor, void* to, DType to_type,
             std::int64_t count) {
  const void* const sources[] = {from};
  sum_in_order(sources, from_type, factor, to, to_type, count, SumMode::assign);
}

}  // namespace mics::comm::detail
