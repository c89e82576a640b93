// SPDX-License-Identifier: Apache-2.0
#pragma once

// Tiles of 64 rows of bf16 in shared memory and the warp's matrix instruction on 16 x 8 x 16.
//
// The 16-byte chunks of a tile's row lie where the row's number turns them (chunk xor row mod 8),
// so that eight rows of one chunk fall into different banks.

#include <gpt/device/numbers.hpp>

#include <cstdint>

namespace gpt::device {

inline constexpr int tile_rows = 64;
inline constexpr int tile_threads = 128;  // four warps, 16 rows each

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

/// A tile (tile_rows, width) by its address in shared memory.
template <int width>
struct Tile {
  static constexpr int bytes = tile_rows * width * 2;
  std::uint32_t base;

  [[nodiscard]] __device__ std::uint32_t chunk(int row, int index) const {
    return base + static_cast<std::uint32_t>(row * width * 2 + ((index ^ (row & 7)) << 4));
  }
};

/// Copies `bytes` (4 or 16) from device to shared memory in the background; zeros unless `inside`.
template <int bytes>
__device__ inline void copy_in_background(std::uint32_t to, const void* from, bool inside) {
  const int read = inside ? bytes : 0;
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(read)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(read)
                 : "memory");
  }
}

/// Closes a group of background copies.
__device__ inline void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most `open` of this thread's groups are under way.
template <int open>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
}

/// Fills a tile with rows that lie `stride` elements apart; zeros from row `rows` on.
template <int width>
__device__ inline void load_tile(Tile<width> tile, const mics::bf16* from, std::int64_t stride,
                                 int rows) {
  constexpr int chunks = width / 8;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x); i < tile_rows * chunks; i += tile_threads) {
    const int row = i / chunks;
    const int index = i % chunks;
    const bool inside = row < rows;
    copy_in_background<16>(tile.chunk(row, index), from + (inside ? row * stride : 0) + index * 8,
                           inside);
  }
}

/// Operand A of the instruction: 16 rows x 16 columns.
struct FragmentA {
  std::uint32_t part[4];
};
/// Two operands B side by side: 16 (depth) x 16 columns.
struct FragmentB {
  std::uint32_t part[4];
};
/// 16 rows x 8 columns: of a thread, columns 2t, 2t + 1 of row g, then of row g + 8, where g = lane
/// / 4 and t = lane % 4.
using Accumulator = float[4];

__device__ inline void load_matrices(std::uint32_t (&part)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(address)
               : "memory");
}
__device__ inline void load_matrices_transposed(std::uint32_t (&part)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(part[0]), "=r"(part[1]), "=r"(part[2]), "=r"(part[3])
               : "r"(address)
               : "memory");
}

/// Rows row .. row + 15 of a tile, columns 16 k .. 16 k + 15, as operand A.
template <int width>
__device__ inline FragmentA load_a(Tile<width> tile, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  FragmentA result;
  load_matrices(result.part, tile.chunk(row + lane % 16, 2 * k + lane / 16));
  return result;
}

/// The transpose of rows row .. row + 15, columns 16 k .. 16 k + 15: depth along the tile's rows'
/// elements, a column of the operand for each of the tile's rows.
template <int width>
__device__ inline FragmentB load_b_of_rows(Tile<width> tile, int row, int k) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  FragmentB result;
  load_matrices(result.part, tile.chunk(row + lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2));
  return result;
}

/// Rows row .. row + 15 as depth, columns 16 n .. 16 n + 15 as columns.
template <int width>
__device__ inline FragmentB load_b_of_columns(Tile<width> tile, int row, int n) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  FragmentB result;
  load_matrices_transposed(result.part, tile.chunk(row + lane % 16, 2 * n + lane / 16));
  return result;
}

__device__ inline void multiply_add(Accumulator& d, const FragmentA& a, std::uint32_t b0,
                                    std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a.part[0]), "r"(a.part[1]), "r"(a.part[2]), "r"(a.part[3]), "r"(b0), "r"(b1));
}

/// left += a * (columns 0-7 of b), right += a * (columns 8-15 of b).
__device__ inline void multiply_add(Accumulator& left, Accumulator& right, const FragmentA& a,
                                    const FragmentB& b) {
  multiply_add(left, a, b.part[0], b.part[1]);
  multiply_add(right, a, b.part[2], b.part[3]);
}

/// Two neighbouring accumulators, 16 x 16, as operand A.
__device__ inline FragmentA as_a(const Accumulator& left, const Accumulator& right) {
  return {{narrow(left[0], left[1]), narrow(left[2], left[3]), narrow(right[0], right[1]),
           narrow(right[2], right[3])}};
}

}  // namespace gpt::device
