// SPDX-License-Identifier: Apache-2.0
#pragma once

// Row-wise kernels with one text for both kinds of processor. A row is one work item with SIMD
// lanes on a host space (omp simd), and one team with its threads as lanes on a device. Kernels are
// written with for_rows and, inside, row_for / row_sum / row_max / row_sync / row_once. All orders
// of summation are fixed: results do not depend on the number of threads.

#include <Kokkos_Core.hpp>

#include <bit>
#include <cstdint>
#include <type_traits>

// Pragmas of OpenMP, where it is on: other compilations, nvcc's device pass among them, would warn.
#if defined(_OPENMP) && !defined(__CUDACC__) && !defined(__HIPCC__)
#define MICS_GPT_PRAGMA(text) _Pragma(text)
#else
#define MICS_GPT_PRAGMA(text)
#endif

namespace gpt {

template <class T, class Exec>
using Vector = Kokkos::View<T*, Kokkos::LayoutRight, typename Exec::memory_space,
                            Kokkos::MemoryTraits<Kokkos::Unmanaged>>;
template <class T, class Exec>
using Matrix = Kokkos::View<T**, Kokkos::LayoutRight, typename Exec::memory_space,
                            Kokkos::MemoryTraits<Kokkos::Unmanaged>>;
template <class T, class Exec>
using Scalar = Kokkos::View<T, Kokkos::LayoutRight, typename Exec::memory_space,
                            Kokkos::MemoryTraits<Kokkos::Unmanaged>>;

template <class Exec>
inline constexpr bool is_host_space =
    Kokkos::SpaceAccessibility<Exec, Kokkos::HostSpace>::accessible;

struct HostRow {};

template <class Exec>
using Row = std::conditional_t<is_host_space<Exec>, HostRow,
                               typename Kokkos::TeamPolicy<Exec>::member_type>;

namespace detail {

template <class F>
struct HostRows {
  F f;
  void operator()(const int i) const { f(HostRow{}, i); }
};

template <class Exec, class F>
struct TeamRows {
  F f;
  KOKKOS_FUNCTION void operator()(const Row<Exec>& row) const { f(row, row.league_rank()); }
};

}  // namespace detail

/// Calls f(row, i) for i in [0, rows). Ordered on exec.
template <class Exec, class F>
void for_rows(const char* label, const Exec& exec, const int rows, const F& f) {
  if constexpr (is_host_space<Exec>) {
    Kokkos::parallel_for(label, Kokkos::RangePolicy<Exec>(exec, 0, rows), detail::HostRows<F>{f});
  } else {
    constexpr int lanes = 128;  // one row has 128 to some thousand elements
    if (rows > 0) {
      Kokkos::parallel_for(label, Kokkos::TeamPolicy<Exec>(exec, rows, lanes),
                           detail::TeamRows<Exec, F>{f});
    }
  }
}

/// Calls f(j) for j in [0, count), in any order: iterations must not depend on each other.
template <class RowType, class F>
KOKKOS_FORCEINLINE_FUNCTION void row_for(const RowType& row, const int count, const F& f) {
  if constexpr (std::is_same_v<RowType, HostRow>) {
    MICS_GPT_PRAGMA("omp simd")
    for (int j = 0; j < count; ++j) f(j);
  } else {
    Kokkos::parallel_for(Kokkos::TeamVectorRange(row, count), f);
  }
}

/// Sum of f(j), j in [0, count), known to all lanes.
template <class Real, class RowType, class F>
KOKKOS_FORCEINLINE_FUNCTION Real row_sum(const RowType& row, const int count, const F& f) {
  Real total = 0;
  if constexpr (std::is_same_v<RowType, HostRow>) {
    MICS_GPT_PRAGMA("omp simd reduction(+ : total)")
    for (int j = 0; j < count; ++j) total += f(j);
  } else {
    Kokkos::parallel_reduce(
        Kokkos::TeamVectorRange(row, count), [&](const int j, Real& sum) { sum += f(j); }, total);
  }
  return total;
}

/// Maximum of f(j), j in [0, count), known to all lanes.
/// \pre count > 0
template <class Real, class RowType, class F>
KOKKOS_FORCEINLINE_FUNCTION Real row_max(const RowType& row, const int count, const F& f) {
  Real largest = f(0);
  if constexpr (std::is_same_v<RowType, HostRow>) {
    MICS_GPT_PRAGMA("omp simd reduction(max : largest)")
    for (int j = 1; j < count; ++j) {
      const Real value = f(j);
      largest = value > largest ? value : largest;
    }
  } else {
    Kokkos::parallel_reduce(
        Kokkos::TeamVectorRange(row, count),
        [&](const int j, Real& most) {
          const Real value = f(j);
          most = value > most ? value : most;
        },
        Kokkos::Max<Real>(largest));
  }
  return largest;
}

/// Makes what row_for wrote visible to all lanes of the row.
template <class RowType>
KOKKOS_FORCEINLINE_FUNCTION void row_sync([[maybe_unused]] const RowType& row) {
  if constexpr (!std::is_same_v<RowType, HostRow>) row.team_barrier();
}

/// Calls f() on one lane of the row.
template <class RowType, class F>
KOKKOS_FORCEINLINE_FUNCTION void row_once(const RowType& row, const F& f) {
  if constexpr (std::is_same_v<RowType, HostRow>) {
    f();
  } else {
    Kokkos::single(Kokkos::PerTeam(row), f);
  }
}

inline constexpr int column_sum_rows = 64;  // rows of one partial sum

/// Elements of the workspace that add_column_sums needs.
[[nodiscard]] constexpr std::int64_t column_sum_workspace(std::int64_t rows, std::int64_t columns) {
  return (rows + column_sum_rows - 1) / column_sum_rows * columns;
}

namespace detail {

template <class Real, class Exec, class F>
struct ColumnPartials {
  static constexpr int tile = is_host_space<Exec> ? 32 : 1;  // columns of a work item

  F f;
  Real* partial;  // (row blocks, columns)
  int rows, columns, tiles;

  KOKKOS_FUNCTION void operator()(const int item) const {
    const int block = item / tiles;
    const int first_column = item % tiles * tile;
    const int first_row = block * column_sum_rows;
    const int last_row = first_row + column_sum_rows < rows ? first_row + column_sum_rows : rows;
    Real* out = partial + static_cast<std::int64_t>(block) * columns + first_column;
    if (first_column + tile <= columns) {
      Real sum[tile] = {};
      for (int i = first_row; i < last_row; ++i) {
        MICS_GPT_PRAGMA("omp simd")
        for (int l = 0; l < tile; ++l) sum[l] += f(i, first_column + l);
      }
      for (int l = 0; l < tile; ++l) out[l] = sum[l];
    } else {
      for (int j = first_column; j < columns; ++j) {
        Real sum = 0;
        for (int i = first_row; i < last_row; ++i) sum += f(i, j);
        out[j - first_column] = sum;
      }
    }
  }
};

template <class Real>
struct ColumnTotals {
  const Real* partial;
  Real* out;
  int blocks, columns;

  KOKKOS_FUNCTION void operator()(const int j) const {
    Real sum = 0;
    for (int b = 0; b < blocks; ++b) sum += partial[static_cast<std::int64_t>(b) * columns + j];
    out[j] += sum;
  }
};

}  // namespace detail

/// out(j) += sum over i of f(i, j), in an order that depends on the extents alone. Ordered on exec.
/// \param[in]     f        callable (row, column) -> Real
/// \param[out]    partial  workspace of column_sum_workspace(rows, columns) elements
/// \param[in,out] out      (columns)
template <class Real, class Exec, class F>
void add_column_sums(const char* label, const Exec& exec, const int rows, const F& f,
                     const Vector<Real, Exec>& partial, const Vector<Real, Exec>& out) {
  const int columns = out.extent_int(0);
  const int blocks = (rows + column_sum_rows - 1) / column_sum_rows;
  if (blocks == 0 || columns == 0) return;
  using Partials = detail::ColumnPartials<Real, Exec, F>;
  const int tiles = (columns + Partials::tile - 1) / Partials::tile;
  Kokkos::parallel_for(label, Kokkos::RangePolicy<Exec>(exec, 0, blocks * tiles),
                       Partials{f, partial.data(), rows, columns, tiles});
  Kokkos::parallel_for(label, Kokkos::RangePolicy<Exec>(exec, 0, columns),
                       detail::ColumnTotals<Real>{partial.data(), out.data(), blocks, columns});
}

namespace detail {

/// e^x in single precision without a branch or a floating-point comparison, so that compilers
/// vectorise it under default flags. Relative error below 2e-7 for |x| <= 87, beyond which x counts
/// as 87 or -87; NaN stays NaN.
inline float vectorizable_exponential(const float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto magnitude = static_cast<std::int32_t>(bits & 0x7fffffffU);
  constexpr auto most = std::bit_cast<std::int32_t>(87.0F);
  const std::int32_t limited = magnitude < most ? magnitude : most;
  const float y = std::bit_cast<float>(static_cast<std::uint32_t>(limited) | (bits & 0x80000000U));
  // Adding 1.5 * 2^23 rounds to the nearest integer n, which then stands in the low bits.
  const float shifted = y * 1.44269504F + 12582912.0F;
  const float n = shifted - 12582912.0F;
  // ln 2 in two parts, the first with trailing zeros, so that n * (first part) is exact.
  const float r = (y - n * 0.693359375F) - n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;  // coefficients of Cephes' expf (S. L. Moshier)
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const std::uint32_t exponent = std::bit_cast<std::uint32_t>(shifted) << 23;
  const auto all_ones_if_nan = -static_cast<std::uint32_t>(magnitude > 0x7f800000);
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(p) + exponent) | all_ones_if_nan);
}

}  // namespace detail

/// e^x; see vectorizable_exponential for float on a host.
template <class Real>
KOKKOS_FORCEINLINE_FUNCTION Real exponential(const Real x) {
  if constexpr (std::is_same_v<Real, float>) {
    KOKKOS_IF_ON_HOST((return detail::vectorizable_exponential(x);))
    KOKKOS_IF_ON_DEVICE((return Kokkos::exp(x);))
  } else {
    return Kokkos::exp(x);
  }
}

}  // namespace gpt
