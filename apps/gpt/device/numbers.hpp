// SPDX-License-Identifier: Apache-2.0
#pragma once

// For kernels: bf16 in registers and sums over the threads of a block.

#include <mics/base/half.hpp>

#include <cuda_bf16.h>

#include <cstdint>

namespace gpt::device {

/// Two bf16 in 32 bits, the first in the low half, rounded to nearest even.
__device__ inline std::uint32_t narrow(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const std::uint32_t*>(&pair);
}

__device__ inline float widen_first(std::uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float widen_second(std::uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000U);
}

/// Eight bf16, 16 bytes.
__device__ inline void widen(const uint4& from, float (&to)[8]) {
  const std::uint32_t pairs[4] = {from.x, from.y, from.z, from.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = widen_first(pairs[i]);
    to[2 * i + 1] = widen_second(pairs[i]);
  }
}

__device__ inline uint4 narrow(const float (&from)[8]) {
  return {narrow(from[0], from[1]), narrow(from[2], from[3]), narrow(from[4], from[5]),
          narrow(from[6], from[7])};
}

/// One bf16.
__device__ inline float widen(mics::bf16 value) {
  return __uint_as_float(std::uint32_t{value.bits} << 16);
}
__device__ inline mics::bf16 narrow(float value) {
  mics::bf16 result;
  result.bits = static_cast<std::uint16_t>(narrow(value, 0.0F));
  return result;
}

inline constexpr int warp_threads = 32;
inline constexpr unsigned whole_warp = 0xffffffffU;

/// Sum over a block of `threads` threads in a fixed order, known to all of them.
template <int threads>
__device__ inline float block_sum(float value) {
  constexpr int warps = threads / warp_threads;
  __shared__ float of_warp[warps];
#pragma unroll
  for (int step = warp_threads / 2; step > 0; step /= 2) {
    value += __shfl_xor_sync(whole_warp, value, step);
  }
  __syncthreads();  // the sums of a call before have been read
  if (threadIdx.x % warp_threads == 0) of_warp[threadIdx.x / warp_threads] = value;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < warps; ++warp) total += of_warp[warp];
  return total;
}

}  // namespace gpt::device
