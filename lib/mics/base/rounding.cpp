// SPDX-License-Identifier: Apache-2.0
#include <mics/base/rounding.hpp>

namespace mics {

// Rounding is integer arithmetic, the same bits on every CPU, and too slow on the oldest ones.
// Sanitizers run before the CPU is known.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MICS_FOR_EACH_X86_64 \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MICS_FOR_EACH_X86_64
#endif

MICS_FOR_EACH_X86_64 void round_all(const float* wide, bf16* narrow, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) narrow[i] = bf16(wide[i]);
}

MICS_FOR_EACH_X86_64 void round_all(const float* wide, fp16* narrow, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) narrow[i] = fp16(wide[i]);
}

#undef MICS_FOR_EACH_X86_64

}  // namespace mics
