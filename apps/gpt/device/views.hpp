// SPDX-License-Identifier: Apache-2.0
#pragma once

// Arrays of the GPT on the device: LayoutRight, unmanaged, in device memory. Rows of a matrix lie
// one after another and begin at multiples of 16 bytes.

#include <mics/base/half.hpp>

#include <Kokkos_Core.hpp>
#include <gpt/rows.hpp>

namespace gpt::device {

using mics::bf16;
using Exec = Kokkos::Cuda;

template <class T>
using Array = Vector<T, Exec>;
template <class T>
using Rows = Matrix<T, Exec>;

/// Elements of bf16 in the 16 bytes that a thread reads or writes at once: widths are multiples.
inline constexpr int lane_elements = 8;

}  // namespace gpt::device
