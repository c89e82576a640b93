// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Macros.hpp>

namespace gpt::device {

/// Rows, columns and depth of the product that measured_peak times.
inline constexpr int peak_extent = 8192;

/// Floating-point operations a second of the device's bf16 matrix products, 2 n^3 for extent n, as
/// the layers run them: the best of some rounds, on numbers that look random. Takes 3 n^2 elements
/// of device memory while it runs. Local; blocks. 0 without a CUDA device.
#if defined(KOKKOS_ENABLE_CUDA)
[[nodiscard]] double measured_peak();
#else
[[nodiscard]] inline double measured_peak() { return 0; }
#endif

}  // namespace gpt::device
