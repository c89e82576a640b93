// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/execution.hpp>
#include <mics/state/flat_model.hpp>

#include <cstdint>

namespace mics::state {

/// Writes the initial values of `range` (elements of `buffer`) to `master` (dtype `master_dtype`)
/// and, rounded from there, to `compute` (dtype of the buffer); either may be null. Gaps are left
/// as they are. Host memory; local; blocks. Every layout gets the same bits, and the device too.
/// Cost of a normal value: 9 ns of a core with AVX-512, 14 with AVX2.
void initialize(const Model& model, const FlatBuffer& buffer, const layout::Interval& range,
                std::uint64_t seed, void* master, DType master_dtype, void* compute);

/// The same in device memory. Ordered in `exec`, an instance of device::Space; blocks only for
/// initial values that are functions of the host, which are copied.
void initialize(const Execution& exec, const Model& model, const FlatBuffer& buffer,
                const layout::Interval& range, std::uint64_t seed, void* master, DType master_dtype,
                void* compute);

}  // namespace mics::state
