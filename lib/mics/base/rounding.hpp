// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/half.hpp>

#include <cstdint>

namespace mics {

/// Rounds `count` elements of host memory to 16 bits, to nearest even: the same bits as the
/// constructors of bf16 and fp16 give, on every CPU, with the widest vectors that this one has.
/// Local; blocks; one thread. The arrays do not overlap.
void round_all(const float* wide, bf16* narrow, std::int64_t count);
void round_all(const float* wide, fp16* narrow, std::int64_t count);

/// Any other pair of types: a conversion of each element.
template <class From, class To>
void round_all(const From* wide, To* narrow, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) narrow[i] = static_cast<To>(wide[i]);
}

}  // namespace mics
