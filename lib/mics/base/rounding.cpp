// SPDX-License-Identifier: Apache-2.0
#include <mics/base/rounding.hpp>
#include <mics/base/vector_clones.hpp>

namespace mics {

// Integer arithmetic, too slow on the oldest CPUs.
MICS_VECTOR_CLONES void round_all(const float* wide, bf16* narrow, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) narrow[i] = bf16(wide[i]);
}

MICS_VECTOR_CLONES void round_all(const float* wide, fp16* narrow, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) narrow[i] = fp16(wide[i]);
}

}  // namespace mics
