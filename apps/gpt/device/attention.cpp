// SPDX-License-Identifier: Apache-2.0
#include <gpt/device/attention.hpp>
#include <gpt/device/check.hpp>
#include <gpt/device/layers.hpp>
#include <gpt/device/tensor_core.hpp>

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace gpt::device {

namespace {

// Where a block works: head `head` of sample `sample`.
template <int width>
struct Place {
  int heads;
  int positions;
  int head;
  int sample;

  __device__ Place(int heads_, int positions_)
      : heads(heads_),
        positions(positions_),
        head(static_cast<int>(blockIdx.y) % heads_),
        sample(static_cast<int>(blockIdx.y) / heads_) {}

  /// Elements from one row to the next: of qkv, and of y.
  [[nodiscard]] __device__ std::int64_t qkv_stride() const {
    return std::int64_t{3} * heads * width;
  }
  [[nodiscard]] __device__ std::int64_t y_stride() const { return std::int64_t{heads} * width; }
  /// Where part 0 (queries), 1 (keys) or 2 (values) of a position begins in qkv.
  [[nodiscard]] __device__ std::int64_t qkv_offset(int part, int position) const {
    return (std::int64_t{sample} * positions + position) * qkv_stride() +
           (std::int64_t{part} * heads + head) * width;
  }
  [[nodiscard]] __device__ std::int64_t y_offset(int position) const {
    return (std::int64_t{sample} * positions + position) * y_stride() + std::int64_t{head} * width;
  }
  /// Of log_sums and row_dots.
  [[nodiscard]] __device__ std::int64_t row_offset(int position) const {
    return std::int64_t{blockIdx.y} * positions + position;
  }
};

// Writes factor * (16 rows of a warp x width); rows from `rows` on are left out.
template <int width>
__device__ void store_rows(const Accumulator (&sum)[width / 8], const float (&factor)[2], bf16* to,
                           std::int64_t stride, int first_row, int rows) {
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first_row + lane / 4 + 8 * half;
    if (row >= rows) continue;
    auto* pairs = reinterpret_cast<std::uint32_t*>(to + row * stride) + lane % 4;
#pragma unroll
    for (int n = 0; n < width / 8; ++n) {
      pairs[4 * n] = narrow(sum[n][2 * half] * factor[half], sum[n][2 * half + 1] * factor[half]);
    }
  }
}

// A block has 64 queries and goes through the keys up to them, 64 at a time, two tiles ahead of
// each other. Each warp has 16 queries. Tiles with most work come first.
template <int width>
__global__ void __launch_bounds__(tile_threads, 2)
    attention_forward_kernel(const bf16* qkv, bf16* y, float* log_sums, int heads, int positions,
                             float scale) {
  extern __shared__ __align__(128) unsigned char memory[];
  using TileType = Tile<width>;
  const std::uint32_t base = shared_address(memory);
  const TileType queries{base};
  const auto keys = [&](int i) { return TileType{base + (1 + i % 2) * TileType::bytes}; };
  const auto values = [&](int i) { return TileType{base + (3 + i % 2) * TileType::bytes}; };
  const Place<width> place(heads, positions);
  const int query_tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int first_query = query_tile * tile_rows;
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const int warp_row = static_cast<int>(threadIdx.x) / warp_threads * 16;
  const auto load = [&](int i) {
    const int first = i * tile_rows;
    load_tile(keys(i), qkv + place.qkv_offset(1, first), place.qkv_stride(), positions - first);
    load_tile(values(i), qkv + place.qkv_offset(2, first), place.qkv_stride(), positions - first);
  };

  load_tile(queries, qkv + place.qkv_offset(0, first_query), place.qkv_stride(),
            positions - first_query);
  load(0);
  close_copies();

  FragmentA q[width / 16];
  Accumulator sum[width / 8] = {};
  float largest[2] = {-INFINITY, -INFINITY};
  float total[2] = {0, 0};
  for (int i = 0; i <= query_tile; ++i) {
    if (i < query_tile) load(i + 1);
    close_copies();
    wait_for_copies<1>();
    __syncthreads();
    if (i == 0) {
#pragma unroll
      for (int k = 0; k < width / 16; ++k) q[k] = load_a(queries, warp_row, k);
    }
    Accumulator score[tile_rows / 8] = {};
#pragma unroll
    for (int k = 0; k < width / 16; ++k) {
#pragma unroll
      for (int n = 0; n < tile_rows / 16; ++n) {
        multiply_add(score[2 * n], score[2 * n + 1], q[k], load_b_of_rows(keys(i), 16 * n, k));
      }
    }
    if (i == query_tile) {
#pragma unroll
      for (int n = 0; n < tile_rows / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = warp_row + lane / 4 + e / 2 * 8;
          const int column = 8 * n + lane % 4 * 2 + e % 2;
          if (column > row) score[n][e] = -INFINITY;
        }
      }
    }
    // What was summed so far refers to the largest score so far.
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = largest[half];
#pragma unroll
      for (int n = 0; n < tile_rows / 8; ++n) {
        most = fmaxf(most, fmaxf(score[n][2 * half], score[n][2 * half + 1]));
      }
      most = fmaxf(most, __shfl_xor_sync(whole_warp, most, 1));
      most = fmaxf(most, __shfl_xor_sync(whole_warp, most, 2));
      const float correction = exp2f((largest[half] - most) * scale);
      const float shift = most * scale;
      largest[half] = most;
      total[half] *= correction;
#pragma unroll
      for (int n = 0; n < tile_rows / 8; ++n) {
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          score[n][e] = exp2f(score[n][e] * scale - shift);
          total[half] += score[n][e];
        }
      }
#pragma unroll
      for (int n = 0; n < width / 8; ++n) {
        sum[n][2 * half] *= correction;
        sum[n][2 * half + 1] *= correction;
      }
    }
#pragma unroll
    for (int k = 0; k < tile_rows / 16; ++k) {
      const FragmentA p = as_a(score[2 * k], score[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < width / 16; ++n) {
        multiply_add(sum[2 * n], sum[2 * n + 1], p, load_b_of_columns(values(i), 16 * k, n));
      }
    }
    __syncthreads();
  }

  float factor[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] += __shfl_xor_sync(whole_warp, total[half], 1);
    total[half] += __shfl_xor_sync(whole_warp, total[half], 2);
    factor[half] = 1 / total[half];
    const int position = first_query + warp_row + lane / 4 + 8 * half;
    if (lane % 4 == 0 && position < positions) {
      log_sums[place.row_offset(position)] = largest[half] * scale + log2f(total[half]);
    }
  }
  store_rows<width>(sum, factor, y + place.y_offset(first_query), place.y_stride(), warp_row,
                    positions - first_query);
}

// row_dots = d_y . y of each row and head, which is the mean gradient of its probabilities.
template <int width>
__global__ void __launch_bounds__(tile_threads)
    row_dots_kernel(const bf16* d_y, const bf16* y, float* row_dots, int heads, int positions) {
  const Place<width> place(heads, positions);
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const int position =
      static_cast<int>(blockIdx.x * (tile_threads / warp_threads) + threadIdx.x / warp_threads);
  if (position >= positions) return;
  const auto* d = reinterpret_cast<const std::uint32_t*>(d_y + place.y_offset(position));
  const auto* v = reinterpret_cast<const std::uint32_t*>(y + place.y_offset(position));
  float sum = 0;
#pragma unroll
  for (int i = lane; i < width / 2; i += warp_threads) {
    sum += widen_first(d[i]) * widen_first(v[i]) + widen_second(d[i]) * widen_second(v[i]);
  }
#pragma unroll
  for (int step = warp_threads / 2; step > 0; step /= 2) {
    sum += __shfl_xor_sync(whole_warp, sum, step);
  }
  if (lane == 0) row_dots[place.row_offset(position)] = sum;
}

constexpr int half_tile = tile_rows / 2;  // columns of scores that a warp holds at a time

// Gradients of 64 keys and values: goes through the queries that see them. Scores are transposed,
// keys along rows, so that they are operands of the products that follow as they are.
template <int width>
__global__ void __launch_bounds__(tile_threads, 2)
    key_value_gradient_kernel(const bf16* d_y, const bf16* qkv, const float* log_sums,
                              const float* row_dots, bf16* d_qkv, int heads, int positions,
                              float scale, float factor) {
  extern __shared__ __align__(128) unsigned char memory[];
  using TileType = Tile<width>;
  const std::uint32_t base = shared_address(memory);
  const TileType keys{base};
  const TileType values{base + TileType::bytes};
  const auto queries = [&](int i) { return TileType{base + (2 + i % 2) * TileType::bytes}; };
  const auto gradients = [&](int i) { return TileType{base + (4 + i % 2) * TileType::bytes}; };
  // Of the tile's queries: log_sums, then row_dots.
  auto* numbers = reinterpret_cast<float*>(memory + 6 * TileType::bytes);
  const Place<width> place(heads, positions);
  const int key_tile = static_cast<int>(blockIdx.x);
  const int first_key = key_tile * tile_rows;
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const int warp_row = static_cast<int>(threadIdx.x) / warp_threads * 16;
  const auto load = [&](int i) {
    const int first = i * tile_rows;
    load_tile(queries(i), qkv + place.qkv_offset(0, first), place.qkv_stride(), positions - first);
    load_tile(gradients(i), d_y + place.y_offset(first), place.y_stride(), positions - first);
    const int row = static_cast<int>(threadIdx.x) % tile_rows;
    const float* from = static_cast<int>(threadIdx.x) < tile_rows ? log_sums : row_dots;
    const bool inside = first + row < positions;
    copy_in_background<4>(
        shared_address(numbers + i % 2 * 2 * tile_rows + static_cast<int>(threadIdx.x)),
        from + place.row_offset(inside ? first + row : 0), inside);
  };

  load_tile(keys, qkv + place.qkv_offset(1, first_key), place.qkv_stride(), positions - first_key);
  load_tile(values, qkv + place.qkv_offset(2, first_key), place.qkv_stride(),
            positions - first_key);
  load(key_tile);
  close_copies();

  Accumulator d_key[width / 8] = {};
  Accumulator d_value[width / 8] = {};
  const int tiles = static_cast<int>(gridDim.x);
  for (int i = key_tile; i < tiles; ++i) {
    if (i + 1 < tiles) load(i + 1);
    close_copies();
    wait_for_copies<1>();
    __syncthreads();
    const float* of_queries = numbers + i % 2 * 2 * tile_rows;
    const bool is_cut = i == key_tile || (i + 1) * tile_rows > positions;
#pragma unroll
    for (int part = 0; part < tile_rows; part += half_tile) {
      Accumulator p[half_tile / 8] = {};
      Accumulator d[half_tile / 8] = {};
#pragma unroll
      for (int k = 0; k < width / 16; ++k) {
        const FragmentA key = load_a(keys, warp_row, k);
        const FragmentA value = load_a(values, warp_row, k);
#pragma unroll
        for (int n = 0; n < half_tile / 16; ++n) {
          multiply_add(p[2 * n], p[2 * n + 1], key, load_b_of_rows(queries(i), part + 16 * n, k));
          multiply_add(d[2 * n], d[2 * n + 1], value,
                       load_b_of_rows(gradients(i), part + 16 * n, k));
        }
      }
#pragma unroll
      for (int n = 0; n < half_tile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int column = part + 8 * n + lane % 4 * 2 + e % 2;
          const int query = i * tile_rows + column;
          const int key = first_key + warp_row + lane / 4 + e / 2 * 8;
          p[n][e] = exp2f(p[n][e] * scale - of_queries[column]);
          if (is_cut && (key > query || query >= positions)) p[n][e] = 0;
          d[n][e] = p[n][e] * (d[n][e] - of_queries[tile_rows + column]);
        }
      }
#pragma unroll
      for (int k = 0; k < half_tile / 16; ++k) {
        const FragmentA probability = as_a(p[2 * k], p[2 * k + 1]);
        const FragmentA d_score = as_a(d[2 * k], d[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < width / 16; ++n) {
          multiply_add(d_value[2 * n], d_value[2 * n + 1], probability,
                       load_b_of_columns(gradients(i), part + 16 * k, n));
          multiply_add(d_key[2 * n], d_key[2 * n + 1], d_score,
                       load_b_of_columns(queries(i), part + 16 * k, n));
        }
      }
    }
    __syncthreads();
  }
  store_rows<width>(d_key, {factor, factor}, d_qkv + place.qkv_offset(1, first_key),
                    place.qkv_stride(), warp_row, positions - first_key);
  store_rows<width>(d_value, {1.0F, 1.0F}, d_qkv + place.qkv_offset(2, first_key),
                    place.qkv_stride(), warp_row, positions - first_key);
}

// Gradients of 64 queries: goes through the keys that they see.
template <int width>
__global__ void __launch_bounds__(tile_threads, 2)
    query_gradient_kernel(const bf16* d_y, const bf16* qkv, const float* log_sums,
                          const float* row_dots, bf16* d_qkv, int heads, int positions, float scale,
                          float factor) {
  extern __shared__ __align__(128) unsigned char memory[];
  using TileType = Tile<width>;
  const std::uint32_t base = shared_address(memory);
  const TileType queries{base};
  const TileType gradients{base + TileType::bytes};
  const auto keys = [&](int i) { return TileType{base + (2 + i % 2) * TileType::bytes}; };
  const auto values = [&](int i) { return TileType{base + (4 + i % 2) * TileType::bytes}; };
  const Place<width> place(heads, positions);
  const int query_tile = static_cast<int>(gridDim.x - 1 - blockIdx.x);
  const int first_query = query_tile * tile_rows;
  const int lane = static_cast<int>(threadIdx.x) % warp_threads;
  const int warp_row = static_cast<int>(threadIdx.x) / warp_threads * 16;
  const auto load = [&](int i) {
    const int first = i * tile_rows;
    load_tile(keys(i), qkv + place.qkv_offset(1, first), place.qkv_stride(), positions - first);
    load_tile(values(i), qkv + place.qkv_offset(2, first), place.qkv_stride(), positions - first);
  };

  load_tile(queries, qkv + place.qkv_offset(0, first_query), place.qkv_stride(),
            positions - first_query);
  load_tile(gradients, d_y + place.y_offset(first_query), place.y_stride(),
            positions - first_query);
  load(0);
  close_copies();

  float log_sum[2];
  float row_dot[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int position = min(first_query + warp_row + lane / 4 + 8 * half, positions - 1);
    log_sum[half] = log_sums[place.row_offset(position)];
    row_dot[half] = row_dots[place.row_offset(position)];
  }
  Accumulator d_query[width / 8] = {};
  for (int i = 0; i <= query_tile; ++i) {
    if (i < query_tile) load(i + 1);
    close_copies();
    wait_for_copies<1>();
    __syncthreads();
#pragma unroll
    for (int part = 0; part < tile_rows; part += half_tile) {
      Accumulator p[half_tile / 8] = {};
      Accumulator d[half_tile / 8] = {};
#pragma unroll
      for (int k = 0; k < width / 16; ++k) {
        const FragmentA query = load_a(queries, warp_row, k);
        const FragmentA gradient = load_a(gradients, warp_row, k);
#pragma unroll
        for (int n = 0; n < half_tile / 16; ++n) {
          multiply_add(p[2 * n], p[2 * n + 1], query, load_b_of_rows(keys(i), part + 16 * n, k));
          multiply_add(d[2 * n], d[2 * n + 1], gradient,
                       load_b_of_rows(values(i), part + 16 * n, k));
        }
      }
#pragma unroll
      for (int n = 0; n < half_tile / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = warp_row + lane / 4 + e / 2 * 8;
          const int column = part + 8 * n + lane % 4 * 2 + e % 2;
          float probability = exp2f(p[n][e] * scale - log_sum[e / 2]);
          if (i == query_tile && column > row) probability = 0;
          d[n][e] = probability * (d[n][e] - row_dot[e / 2]);
        }
      }
#pragma unroll
      for (int k = 0; k < half_tile / 16; ++k) {
        const FragmentA d_score = as_a(d[2 * k], d[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < width / 16; ++n) {
          multiply_add(d_query[2 * n], d_query[2 * n + 1], d_score,
                       load_b_of_columns(keys(i), part + 16 * k, n));
        }
      }
    }
    __syncthreads();
  }
  store_rows<width>(d_query, {factor, factor}, d_qkv + place.qkv_offset(0, first_query),
                    place.qkv_stride(), warp_row, positions - first_query);
}

// More than 48 KB of shared memory has to be asked for.
template <class Kernel>
void allow_shared_memory(Kernel* kernel, int bytes) {
  check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        "cudaFuncSetAttribute");
}

template <int width>
inline constexpr int forward_bytes = 5 * Tile<width>::bytes;
template <int width>
inline constexpr int key_value_bytes = 6 * Tile<width>::bytes + 4 * tile_rows * 4;
template <int width>
inline constexpr int query_bytes = 6 * Tile<width>::bytes;

template <int width>
void prepare_kernels() {
  static const bool done = [] {
    allow_shared_memory(attention_forward_kernel<width>, forward_bytes<width>);
    allow_shared_memory(key_value_gradient_kernel<width>, key_value_bytes<width>);
    allow_shared_memory(query_gradient_kernel<width>, query_bytes<width>);
    return true;
  }();
  static_cast<void>(done);
}

constexpr float log2_of_e = 1.4426950408889634F;

// Calls f(std::integral_constant<int, width>) for a width that kernels exist for.
template <class F>
void with_head_width(int width, const F& f) {
  if (width == 128) return f(std::integral_constant<int, 128>());
  if (width == 64) return f(std::integral_constant<int, 64>());
  throw std::invalid_argument(
      "gpt::device::attention: width of a head: expected 64 or 128, found " +
      std::to_string(width));
}

}  // namespace

void attention_forward(const Exec& exec, int heads, int positions, Rows<const bf16> qkv,
                       Rows<bf16> y, Array<float> log_sums) {
  if (y.extent_int(0) == 0) return;
  with_head_width(y.extent_int(1) / heads, [&](auto width) {
    prepare_kernels<width>();
    const int tiles = (positions + tile_rows - 1) / tile_rows;
    const dim3 grid(tiles, y.extent_int(0) / positions * heads);
    const float scale = log2_of_e / std::sqrt(static_cast<float>(width));
    attention_forward_kernel<width>
        <<<grid, tile_threads, forward_bytes<width>, exec.cuda_stream()>>>(
            qkv.data(), y.data(), log_sums.data(), heads, positions, scale);
  });
  check(cudaGetLastError(), "attention_forward");
}

void attention_backward(const Exec& exec, int heads, int positions, Rows<const bf16> d_y,
                        Rows<const bf16> y, Rows<const bf16> qkv, Array<const float> log_sums,
                        Rows<bf16> d_qkv, Array<float> row_dots) {
  if (y.extent_int(0) == 0) return;
  with_head_width(y.extent_int(1) / heads, [&](auto width) {
    prepare_kernels<width>();
    const int tiles = (positions + tile_rows - 1) / tile_rows;
    const int pairs = y.extent_int(0) / positions * heads;
    const float factor = 1 / std::sqrt(static_cast<float>(width));
    const cudaStream_t stream = exec.cuda_stream();
    constexpr int warps = tile_threads / warp_threads;
    row_dots_kernel<width>
        <<<dim3((positions + warps - 1) / warps, pairs), tile_threads, 0, stream>>>(
            d_y.data(), y.data(), row_dots.data(), heads, positions);
    key_value_gradient_kernel<width>
        <<<dim3(tiles, pairs), tile_threads, key_value_bytes<width>, stream>>>(
            d_y.data(), qkv.data(), log_sums.data(), row_dots.data(), d_qkv.data(), heads,
            positions, log2_of_e * factor, factor);
    query_gradient_kernel<width><<<dim3(tiles, pairs), tile_threads, query_bytes<width>, stream>>>(
        d_y.data(), qkv.data(), log_sums.data(), row_dots.data(), d_qkv.data(), heads, positions,
        log2_of_e * factor, factor);
  });
  check(cudaGetLastError(), "attention_backward");
}

namespace {

// The heads of one sample as a batch of products. Operands: a part of qkv, scores, or y.
struct HeadProducts {
  Products& products;
  const Exec& exec;
  int heads, positions, width;

  struct Matrices {
    bf16* data;
    int leading;
    std::int64_t stride;
  };
  [[nodiscard]] Matrices qkv_part(const bf16* qkv, int sample, int part) const {
    const int row = 3 * heads * width;
    return {const_cast<bf16*>(qkv) + std::int64_t{sample} * positions * row +
                std::int64_t{part} * heads * width,
            row, width};
  }
  [[nodiscard]] Matrices y_part(const bf16* y, int sample) const {
    const int row = heads * width;
    return {const_cast<bf16*>(y) + std::int64_t{sample} * positions * row, row, width};
  }
  [[nodiscard]] Matrices scores(const Rows<bf16>& all) const {
    return {all.data(), positions, std::int64_t{positions} * positions};
  }

  void multiply(Transpose turn_a, Transpose turn_b, int columns, int depth, const Matrices& a,
                const Matrices& b, const Matrices& d) const {
    products.run(exec,
                 {.rows = positions,
                  .columns = columns,
                  .depth = depth,
                  .transpose_a = turn_a,
                  .transpose_b = turn_b,
                  .leading_a = a.leading,
                  .leading_b = b.leading,
                  .leading_d = d.leading,
                  .batch = heads,
                  .stride_a = a.stride,
                  .stride_b = b.stride,
                  .stride_d = d.stride},
                 {.a = a.data, .b = b.data, .d = d.data});
  }
};

HeadProducts head_products(const Exec& exec, Products& products, int heads,
                           const Rows<const bf16>& qkv, const Rows<bf16>& scores) {
  return {products, exec, heads, scores.extent_int(1), qkv.extent_int(1) / 3 / heads};
}

}  // namespace

void plain_attention_forward(const Exec& exec, Products& products, int heads, Rows<const bf16> qkv,
                             Rows<bf16> y, Rows<bf16> scores) {
  const HeadProducts of = head_products(exec, products, heads, qkv, scores);
  const float factor = 1 / std::sqrt(static_cast<float>(of.width));
  const int samples = y.extent_int(0) / of.positions;
  for (int b = 0; b < samples; ++b) {
    of.multiply(Transpose::no, Transpose::yes, of.positions, of.width,
                of.qkv_part(qkv.data(), b, 0), of.qkv_part(qkv.data(), b, 1), of.scores(scores));
    causal_softmax_forward(exec, factor, scores);
    of.multiply(Transpose::no, Transpose::no, of.width, of.positions, of.scores(scores),
                of.qkv_part(qkv.data(), b, 2), of.y_part(y.data(), b));
  }
}

void plain_attention_backward(const Exec& exec, Products& products, int heads, Rows<const bf16> d_y,
                              Rows<const bf16> qkv, Rows<bf16> d_qkv, Rows<bf16> scores,
                              Rows<bf16> d_scores) {
  const HeadProducts of = head_products(exec, products, heads, qkv, scores);
  const float factor = 1 / std::sqrt(static_cast<float>(of.width));
  const int samples = d_y.extent_int(0) / of.positions;
  for (int b = 0; b < samples; ++b) {
    const auto query = of.qkv_part(qkv.data(), b, 0);
    const auto key = of.qkv_part(qkv.data(), b, 1);
    const auto value = of.qkv_part(qkv.data(), b, 2);
    const auto d_out = of.y_part(d_y.data(), b);
    const auto p = of.scores(scores);
    const auto d_p = of.scores(d_scores);
    of.multiply(Transpose::no, Transpose::yes, of.positions, of.width, query, key, p);
    causal_softmax_forward(exec, factor, scores);
    of.multiply(Transpose::yes, Transpose::no, of.width, of.positions, p, d_out,
                of.qkv_part(d_qkv.data(), b, 2));
    of.multiply(Transpose::no, Transpose::yes, of.positions, of.width, d_out, value, d_p);
    causal_softmax_backward(exec, factor, scores, d_scores);
    of.multiply(Transpose::no, Transpose::no, of.width, of.positions, d_p, key,
                of.qkv_part(d_qkv.data(), b, 0));
    of.multiply(Transpose::yes, Transpose::no, of.width, of.positions, d_p, query,
                of.qkv_part(d_qkv.data(), b, 1));
  }
}

}  // namespace gpt::device
