// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace gpt {

/// Rows, columns and depth of the product that measured_peak times.
inline constexpr int peak_extent = 512;

/// Floating-point operations a second of this rank's matrix products, 2 n^3 for extent n: the best
/// of some rounds of square products through the same BLAS that the layers use. A round is longer
/// than a time slice, so that ranks that share a core, and call it at once, find their share. Takes
/// about 0.1 s, and 3 n^2 elements while it runs. Local.
/// \tparam Real  float or double
template <class Real>
[[nodiscard]] double measured_peak();

}  // namespace gpt
