// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/detail/device_sum.hpp>

#include <Kokkos_Core.hpp>

#include <algorithm>
#include <array>

namespace mics::comm::detail {
namespace {

using device::Space;

// A product that no compiler joins with a following sum into one operation of one rounding: the
// host's does not.
template <class Sum>
KOKKOS_INLINE_FUNCTION Sum product(Sum a, Sum b) {
#if defined(__CUDA_ARCH__) || defined(__HIP_DEVICE_COMPILE__)
  if constexpr (sizeof(Sum) == sizeof(float)) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

/// Neighbouring elements that one thread reads or writes at once.
template <class T, int width>
struct alignas(std::min<std::size_t>(sizeof(T) * width, 16)) Pack {
  T element[width];
};

template <class Source, class Sum, class Result, int width>
struct SumPieces {
  const Source* own;
  const Source* others;
  std::int64_t stride;
  int rank;
  int size;
  Sum factor;
  Result* result;
  std::int64_t count;
  bool add;

  KOKKOS_FUNCTION void operator()(std::int64_t i) const {
    const std::int64_t begin = i * width;
    if (begin + width <= count) {
      sum<width>(begin);
    } else {
      for (std::int64_t at = begin; at < count; ++at) sum<1>(at);
    }
  }

  template <int n>
  KOKKOS_INLINE_FUNCTION void addends(int r, std::int64_t at, Sum* values) const {
    const Source* const piece = r == rank ? own : others + (r < rank ? r : r - 1) * stride;
    const Pack<Source, n> read = *reinterpret_cast<const Pack<Source, n>*>(piece + at);
    for (int e = 0; e < n; ++e) {
      values[e] = static_cast<Sum>(read.element[e]);
      if (factor != Sum{1}) values[e] = product(values[e], factor);
    }
  }

  template <int n>
  KOKKOS_INLINE_FUNCTION void sum(std::int64_t at) const {
    Sum partial[n];
    addends<n>(0, at, partial);
    for (int r = 1; r < size; ++r) {
      Sum more[n];
      addends<n>(r, at, more);
      for (int e = 0; e < n; ++e) partial[e] += more[e];
    }
    auto* const target = reinterpret_cast<Pack<Result, n>*>(result + at);
    if (add) {
      const Pack<Result, n> before = *target;
      for (int e = 0; e < n; ++e) partial[e] = static_cast<Sum>(before.element[e]) + partial[e];
    }
    Pack<Result, n> rounded;
    for (int e = 0; e < n; ++e) rounded.element[e] = static_cast<Result>(partial[e]);
    *target = rounded;
  }
};

bool is_aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

template <int width, class Source, class Sum, class Result>
void launch(const Execution& exec, const RankPieces& pieces, Sum factor, Result* result,
            std::int64_t count, SumMode mode) {
  const SumPieces<Source, Sum, Result, width> kernel{static_cast<const Source*>(pieces.own),
                                                     static_cast<const Source*>(pieces.others),
                                                     pieces.stride,
                                                     pieces.rank,
                                                     pieces.size,
                                                     factor,
                                                     result,
                                                     count,
                                                     mode == SumMode::add};
  using Policy = Kokkos::RangePolicy<Space, Kokkos::IndexType<std::int64_t>>;
  Kokkos::parallel_for("mics::comm::sum_on_device",
                       Policy(exec.as<Space>(), 0, (count + width - 1) / width), kernel);
}

template <class Source, class Sum, class Result>
void sum_typed(const Execution& exec, const RankPieces& pieces, double factor, Result* result,
               std::int64_t count, SumMode mode) {
  constexpr int width = 16 / static_cast<int>(std::min(sizeof(Source), sizeof(Result)));
  const bool aligned =
      is_aligned(pieces.own) && is_aligned(result) &&
      (pieces.size == 1 || (is_aligned(pieces.others) &&
                            pieces.stride * static_cast<std::int64_t>(sizeof(Source)) % 16 == 0));
  if (aligned) {
    launch<width, Source>(exec, pieces, static_cast<Sum>(factor), result, count, mode);
  } else {
    launch<1, Source>(exec, pieces, static_cast<Sum>(factor), result, count, mode);
  }
}

}  // namespace

void sum_on_device(const Execution& exec, const RankPieces& pieces, DType source_type,
                   double factor, void* result, DType result_type, std::int64_t count,
                   SumMode mode) {
  if (count == 0) return;
  visit(source_type, [&](auto from) {
    using Source = typename decltype(from)::type;
    visit(result_type, [&](auto to) {
      using Result = typename decltype(to)::type;
      constexpr bool wide = std::is_same_v<Source, double> || std::is_same_v<Result, double>;
      using Sum = std::conditional_t<wide, double, float>;
      sum_typed<Source, Sum>(exec, pieces, factor, static_cast<Result*>(result), count, mode);
    });
  });
}

void convert_on_device(const Execution& exec, const void* from, DType from_type, double factor,
                       void* to, DType to_type, std::int64_t count) {
  sum_on_device(exec, {.own = from}, from_type, factor, to, to_type, count, SumMode::assign);
}

}  // namespace mics::comm::detail
