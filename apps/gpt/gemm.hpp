// SPDX-License-Identifier: Apache-2.0
#pragma once

// Matrix products on row-major memory: CBLAS on host spaces, a plain kernel on others (correct, not
// fast: a vendor library belongs there).

#include <Kokkos_Core.hpp>
#include <cblas.h>
#include <gpt/rows.hpp>

#include <cstdint>
#include <type_traits>

namespace gpt {

enum class Transpose { no, yes };

/// A batch of outer x inner matrices with the same leading dimension in one allocation; matrix (o,
/// i) starts at data + o * outer_stride + i * inner_stride. Counts are in elements. A single matrix
/// needs no strides.
template <class T>
struct Operand {
  T* data = nullptr;
  int leading = 0;
  std::int64_t outer_stride = 0;
  std::int64_t inner_stride = 0;

  [[nodiscard]] KOKKOS_FUNCTION T* at(int outer, int inner) const {
    return data + outer * outer_stride + inner * inner_stride;
  }
};

/// Extents of C = op(A) op(B): op(A) is (rows, depth), op(B) is (depth, columns).
struct GemmShape {
  int rows = 0;
  int columns = 0;
  int depth = 0;
  int outer = 1;  // matrices in the batch: outer * inner
  int inner = 1;
};

namespace detail {

template <class Real>
struct PlainGemm {
  Transpose transpose_a, transpose_b;
  GemmShape shape;
  Real alpha, beta;
  Operand<const Real> a, b;
  Operand<Real> c;

  KOKKOS_FUNCTION void operator()(const std::int64_t item) const {
    const int j = static_cast<int>(item % shape.columns);
    const int i = static_cast<int>(item / shape.columns % shape.rows);
    const int matrix = static_cast<int>(item / shape.columns / shape.rows);
    const int outer = matrix / shape.inner;
    const int inner = matrix % shape.inner;
    const Real* a_matrix = a.at(outer, inner);
    const Real* b_matrix = b.at(outer, inner);
    const std::int64_t a_row = transpose_a == Transpose::no ? a.leading : 1;
    const std::int64_t a_step = transpose_a == Transpose::no ? 1 : a.leading;
    const std::int64_t b_step = transpose_b == Transpose::no ? b.leading : 1;
    const std::int64_t b_column = transpose_b == Transpose::no ? 1 : b.leading;
    Real sum = 0;
    for (int k = 0; k < shape.depth; ++k) {
      sum += a_matrix[i * a_row + k * a_step] * b_matrix[k * b_step + j * b_column];
    }
    Real& target = c.at(outer, inner)[static_cast<std::int64_t>(i) * c.leading + j];
    target = beta == Real(0) ? alpha * sum : alpha * sum + beta * target;
  }
};

}  // namespace detail

/// C = alpha op(A) op(B) + beta C for each matrix of a batch by a portable kernel. Ordered on exec.
template <class Real, class Exec>
void plain_gemm(const Exec& exec, Transpose transpose_a, Transpose transpose_b,
                const GemmShape& shape, Real alpha, const Operand<const Real>& a,
                const Operand<const Real>& b, Real beta, const Operand<Real>& c) {
  const std::int64_t items = std::int64_t{shape.rows} * shape.columns * shape.outer * shape.inner;
  Kokkos::parallel_for(
      "gpt::plain_gemm", Kokkos::RangePolicy<Exec, Kokkos::IndexType<std::int64_t>>(exec, 0, items),
      detail::PlainGemm<Real>{transpose_a, transpose_b, shape, alpha, beta, a, b, c});
}

/// C = alpha op(A) op(B) + beta C for each matrix of a batch; with beta = 0, C is not read.
///
/// Ordered on exec; on host spaces it blocks until exec and the product are done. Extents of 0 are
/// fine. \tparam Real  float or double
template <class Real, class Exec>
void gemm(const Exec& exec, Transpose transpose_a, Transpose transpose_b, const GemmShape& shape,
          Real alpha, const std::type_identity_t<Operand<const Real>>& a,
          const std::type_identity_t<Operand<const Real>>& b, Real beta,
          const std::type_identity_t<Operand<Real>>& c) {
  static_assert(std::is_same_v<Real, float> || std::is_same_v<Real, double>,
                "gpt::gemm: CBLAS has float and double");
  if (shape.rows == 0 || shape.columns == 0 || shape.outer == 0 || shape.inner == 0) return;
  if constexpr (is_host_space<Exec>) {
    if (shape.depth ==
        0) {  // CBLAS demands a leading dimension of at least 1, which empty views lack
      plain_gemm<Real>(exec, transpose_a, transpose_b, shape, alpha, a, b, beta, c);
      return;
    }
    exec.fence("gpt::gemm: operands are ready before BLAS reads them");
    const CBLAS_TRANSPOSE op_a = transpose_a == Transpose::no ? CblasNoTrans : CblasTrans;
    const CBLAS_TRANSPOSE op_b = transpose_b == Transpose::no ? CblasNoTrans : CblasTrans;
    for (int outer = 0; outer < shape.outer; ++outer) {
      for (int inner = 0; inner < shape.inner; ++inner) {
        const Real* a_matrix = a.at(outer, inner);
        const Real* b_matrix = b.at(outer, inner);
        Real* c_matrix = c.at(outer, inner);
        if constexpr (std::is_same_v<Real, float>) {
          cblas_sgemm(CblasRowMajor, op_a, op_b, shape.rows, shape.columns, shape.depth, alpha,
                      a_matrix, a.leading, b_matrix, b.leading, beta, c_matrix, c.leading);
        } else {
          cblas_dgemm(CblasRowMajor, op_a, op_b, shape.rows, shape.columns, shape.depth, alpha,
                      a_matrix, a.leading, b_matrix, b.leading, beta, c_matrix, c.leading);
        }
      }
    }
  } else {
    plain_gemm<Real>(exec, transpose_a, transpose_b, shape, alpha, a, b, beta, c);
  }
}

}  // namespace gpt
