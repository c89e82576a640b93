// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/h5/handle.hpp>

#include <cstddef>
#include <vector>

namespace mics::h5 {

/// The little-endian type of a file whose elements have the bits of `dtype`; complex: a compound of
/// two such, `r` and `i`, which h5py shows as complex numbers. bf16 and fp16 are floating-point
/// types of two bytes, which every HDF5 converts exactly to float where a reader asks for it. mics
/// itself reads and writes bits and never lets HDF5 convert. Local.
[[nodiscard]] Datatype file_type(DType dtype, bool complex);

/// The bytes of one element that is not a number, in both parts if complex. Local.
[[nodiscard]] std::vector<std::byte> nan_element(DType dtype, bool complex);

}  // namespace mics::h5
