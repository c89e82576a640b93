// SPDX-License-Identifier: Apache-2.0
#include <gpt/device/check.hpp>
#include <gpt/device/layers.hpp>
#include <gpt/device/numbers.hpp>
#include <gpt/layers.hpp>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace gpt::device {

namespace {

const uint4* lanes(const bf16* data) { return reinterpret_cast<const uint4*>(data); }
uint4* lanes(bf16* data) { return reinterpret_cast<uint4*>(data); }

void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

constexpr int row_threads = 128;  // of a layer norm: one row to a block

// Calls f(std::integral_constant<int, n>) with the lanes of 8 elements that each thread holds.
template <class F>
void with_lanes_a_thread(int width, const F& f) {
  const int needed = (width / lane_elements + row_threads - 1) / row_threads;
  if (needed <= 1) return f(std::integral_constant<int, 1>());
  if (needed <= 2) return f(std::integral_constant<int, 2>());
  if (needed <= 4) return f(std::integral_constant<int, 4>());
  if (needed <= 8) return f(std::integral_constant<int, 8>());
  throw std::invalid_argument("gpt::device::layer_norm: width: expected at most " +
                              std::to_string(most_width) + ", found " + std::to_string(width));
}

template <int count>
__global__ void __launch_bounds__(row_threads)
    layer_norm_forward_kernel(const uint4* x, const uint4* weight, const uint4* bias, uint4* y,
                              float* mean, float* rstd, int row_lanes) {
  const std::int64_t start = std::int64_t{blockIdx.x} * row_lanes;
  const float width = static_cast<float>(row_lanes * lane_elements);
  float value[count][lane_elements];
  float sum = 0;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const int lane = threadIdx.x + k * row_threads;
    if (lane < row_lanes) {
      widen(x[start + lane], value[k]);
#pragma unroll
      for (int i = 0; i < lane_elements; ++i) sum += value[k][i];
    }
  }
  const float center = block_sum<row_threads>(sum) / width;
  float squares = 0;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (threadIdx.x + k * row_threads < row_lanes) {
#pragma unroll
      for (int i = 0; i < lane_elements; ++i) {
        value[k][i] -= center;
        squares += value[k][i] * value[k][i];
      }
    }
  }
  const float scale =
      rsqrtf(block_sum<row_threads>(squares) / width + static_cast<float>(layer_norm_epsilon));
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const int lane = threadIdx.x + k * row_threads;
    if (lane < row_lanes) {
      float w[lane_elements];
      float b[lane_elements];
      widen(weight[lane], w);
      widen(bias[lane], b);
#pragma unroll
      for (int i = 0; i < lane_elements; ++i) value[k][i] = value[k][i] * scale * w[i] + b[i];
      y[start + lane] = narrow(value[k]);
    }
  }
  if (threadIdx.x == 0) {
    mean[blockIdx.x] = center;
    rstd[blockIdx.x] = scale;
  }
}

// A block goes through every gridDim.x-th row and keeps the sums of its columns in registers.
template <int count, bool add>
__global__ void __launch_bounds__(row_threads)
    layer_norm_backward_kernel(const uint4* d_y, const uint4* x, const float* mean,
                               const float* rstd, const uint4* weight, uint4* d_x, float* partial,
                               int rows, int row_lanes) {
  const float width = static_cast<float>(row_lanes * lane_elements);
  float d_weight[count][lane_elements] = {};
  float d_bias[count][lane_elements] = {};
  for (int row = static_cast<int>(blockIdx.x); row < rows; row += static_cast<int>(gridDim.x)) {
    const std::int64_t start = std::int64_t{row} * row_lanes;
    const float center = mean[row];
    const float scale = rstd[row];
    float normal[count][lane_elements];
    float d[count][lane_elements];
    float sum = 0;
    float product = 0;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int lane = threadIdx.x + k * row_threads;
      if (lane < row_lanes) {
        float w[lane_elements];
        widen(x[start + lane], normal[k]);
        widen(d_y[start + lane], d[k]);
        widen(weight[lane], w);
#pragma unroll
        for (int i = 0; i < lane_elements; ++i) {
          normal[k][i] = (normal[k][i] - center) * scale;
          d_weight[k][i] += d[k][i] * normal[k][i];
          d_bias[k][i] += d[k][i];
          d[k][i] *= w[i];
          sum += d[k][i];
          product += d[k][i] * normal[k][i];
        }
      }
    }
    const float mean_d = block_sum<row_threads>(sum) / width;
    const float mean_product = block_sum<row_threads>(product) / width;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const int lane = threadIdx.x + k * row_threads;
      if (lane < row_lanes) {
        float result[lane_elements] = {};
        if constexpr (add) widen(d_x[start + lane], result);
#pragma unroll
        for (int i = 0; i < lane_elements; ++i) {
          result[i] += scale * (d[k][i] - mean_d - normal[k][i] * mean_product);
        }
        d_x[start + lane] = narrow(result);
      }
    }
  }
  const int columns = row_lanes * lane_elements;
  float* of_block = partial + std::int64_t{blockIdx.x} * 2 * columns;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const int lane = threadIdx.x + k * row_threads;
    if (lane < row_lanes) {
#pragma unroll
      for (int i = 0; i < lane_elements; ++i) {
        of_block[lane * lane_elements + i] = d_weight[k][i];
        of_block[columns + lane * lane_elements + i] = d_bias[k][i];
      }
    }
  }
}

// Adds the blocks' partial sums: 32 columns to a block, each of them to 32 threads.
constexpr int tile = 32;
__global__ void __launch_bounds__(tile* tile)
    layer_norm_sums_kernel(const float* partial, int blocks, int columns, bf16* d_weight,
                           bf16* d_bias) {
  __shared__ float sums[tile][tile + 1];
  const int column = static_cast<int>(blockIdx.x) * tile + static_cast<int>(threadIdx.x);
  float sum = 0;
  if (column < 2 * columns) {
    for (int i = static_cast<int>(threadIdx.y); i < blocks; i += tile) {
      sum += partial[std::int64_t{i} * 2 * columns + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= 2 * columns) return;
  float total = 0;
  for (int i = 0; i < tile; ++i) total += sums[i][threadIdx.x];
  (column < columns ? d_weight[column] : d_bias[column - columns]) = narrow(total);
}

int layer_norm_blocks() {
  static const int blocks = [] {
    int device = 0;
    int processors = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
          "cudaDeviceGetAttribute");
    return 4 * processors;
  }();
  return blocks;
}

// 2 sqrt(2/pi) and the cubic term: 1/2 (1 + tanh(u)) = 1 / (1 + exp(-2u)).
constexpr float gelu_slope = 1.5957691216057308F;
constexpr float gelu_cubic = 0.044715F;

constexpr int element_threads = 256;

__global__ void __launch_bounds__(element_threads)
    gelu_forward_kernel(const uint4* x, uint4* y, std::int64_t count) {
  const std::int64_t i = std::int64_t{blockIdx.x} * element_threads + threadIdx.x;
  if (i >= count) return;
  float value[lane_elements];
  widen(x[i], value);
#pragma unroll
  for (float& v : value) {
    const float u = gelu_slope * v * (1 + gelu_cubic * v * v);
    v = v / (1 + __expf(-u));
  }
  y[i] = narrow(value);
}

__global__ void __launch_bounds__(element_threads)
    join_biases_kernel(const bf16* query, const bf16* value, bf16* all, int width) {
  const int i = static_cast<int>(blockIdx.x * element_threads + threadIdx.x);
  if (i >= width) return;
  all[i] = query[i];
  all[width + i] = bf16{};
  all[2 * width + i] = value[i];
}

__global__ void __launch_bounds__(element_threads)
    part_biases_kernel(const bf16* all, bf16* query, bf16* value, int width) {
  const int i = static_cast<int>(blockIdx.x * element_threads + threadIdx.x);
  if (i >= width) return;
  query[i] = all[i];
  value[i] = all[2 * width + i];
}

int blocks_of(std::int64_t count) {
  return static_cast<int>((count + element_threads - 1) / element_threads);
}

__global__ void __launch_bounds__(element_threads)
    embedding_forward_kernel(const Token* windows, int positions, const uint4* token,
                             const uint4* position, uint4* x, int row_lanes) {
  const int row = static_cast<int>(blockIdx.x);
  const int t = row % positions;
  const std::int64_t of_token =
      std::int64_t{windows[std::int64_t{row / positions} * (positions + 1) + t]} * row_lanes;
  for (int lane = static_cast<int>(threadIdx.x); lane < row_lanes; lane += element_threads) {
    float a[lane_elements];
    float b[lane_elements];
    widen(token[of_token + lane], a);
    widen(position[std::int64_t{t} * row_lanes + lane], b);
#pragma unroll
    for (int i = 0; i < lane_elements; ++i) a[i] += b[i];
    x[std::int64_t{row} * row_lanes + lane] = narrow(a);
  }
}

// A block for each row in the order of tokens; the first one of a token adds all of them.
__global__ void __launch_bounds__(element_threads)
    token_gradient_kernel(const Token* windows, int positions, const std::int32_t* order, int rows,
                          const uint4* d_x, uint4* d_token, int row_lanes) {
  const auto token = [&](int i) {
    return windows[std::int64_t{order[i] / positions} * (positions + 1) + order[i] % positions];
  };
  const int first = static_cast<int>(blockIdx.x);
  const Token mine = token(first);
  if (first > 0 && token(first - 1) == mine) return;
  int end = first + 1;
  while (end < rows && token(end) == mine) ++end;
  for (int lane = static_cast<int>(threadIdx.x); lane < row_lanes; lane += element_threads) {
    uint4& target = d_token[std::int64_t{mine} * row_lanes + lane];
    float sum[lane_elements];
    widen(target, sum);
    for (int i = first; i < end; ++i) {
      float d[lane_elements];
      widen(d_x[std::int64_t{order[i]} * row_lanes + lane], d);
#pragma unroll
      for (int j = 0; j < lane_elements; ++j) sum[j] += d[j];
    }
    target = narrow(sum);
  }
}

__global__ void __launch_bounds__(element_threads)
    position_gradient_kernel(int batch, int positions, const uint4* d_x, uint4* d_position,
                             int row_lanes) {
  const int t = static_cast<int>(blockIdx.x);
  for (int lane = static_cast<int>(threadIdx.x); lane < row_lanes; lane += element_threads) {
    float sum[lane_elements] = {};
    for (int b = 0; b < batch; ++b) {
      float d[lane_elements];
      widen(d_x[(std::int64_t{b} * positions + t) * row_lanes + lane], d);
#pragma unroll
      for (int j = 0; j < lane_elements; ++j) sum[j] += d[j];
    }
    d_position[std::int64_t{t} * row_lanes + lane] = narrow(sum);
  }
}

constexpr int loss_threads = 512;

// The largest value met so far and the sum of exp(value - largest).
struct SoftmaxSum {
  float largest = -INFINITY;
  float sum = 0;
};

__device__ SoftmaxSum join(const SoftmaxSum& a, const SoftmaxSum& b) {
  if (b.sum == 0) return a;
  if (a.sum == 0) return b;
  const float largest = fmaxf(a.largest, b.largest);
  return {largest, a.sum * __expf(a.largest - largest) + b.sum * __expf(b.largest - largest)};
}

__device__ SoftmaxSum block_join(SoftmaxSum value) {
  constexpr int warps = loss_threads / warp_threads;
  __shared__ SoftmaxSum of_warp[warps];
#pragma unroll
  for (int step = warp_threads / 2; step > 0; step /= 2) {
    value = join(value, {__shfl_xor_sync(whole_warp, value.largest, step),
                         __shfl_xor_sync(whole_warp, value.sum, step)});
  }
  if (threadIdx.x % warp_threads == 0) of_warp[threadIdx.x / warp_threads] = value;
  __syncthreads();
  SoftmaxSum total = of_warp[0];
  for (int warp = 1; warp < warps; ++warp) total = join(total, of_warp[warp]);
  return total;
}

// A block for each row. The second read of the row comes from the cache.
template <bool gradient>
__global__ void __launch_bounds__(loss_threads)
    cross_entropy_kernel(uint4* logits, const Token* windows, int positions, int first_row,
                         const double* loss_scale, float* row_losses, int row_lanes) {
  const int row = first_row + static_cast<int>(blockIdx.x);
  const Token target =
      windows[std::int64_t{row / positions} * (positions + 1) + row % positions + 1];
  uint4* z = logits + std::int64_t{blockIdx.x} * row_lanes;
  const float of_target = widen(reinterpret_cast<const bf16*>(z)[target]);
  SoftmaxSum mine;
  for (int lane = static_cast<int>(threadIdx.x); lane < row_lanes; lane += loss_threads) {
    float value[lane_elements];
    widen(z[lane], value);
    float largest = value[0];
#pragma unroll
    for (int i = 1; i < lane_elements; ++i) largest = fmaxf(largest, value[i]);
    SoftmaxSum here{largest, 0};
#pragma unroll
    for (const float v : value) here.sum += __expf(v - largest);
    mine = join(mine, here);
  }
  const SoftmaxSum all = block_join(mine);  // every thread has read of_target then
  if (threadIdx.x == 0) row_losses[row] = logf(all.sum) - (of_target - all.largest);
  if constexpr (gradient) {
    const float weight = static_cast<float>(*loss_scale) / static_cast<float>(positions);
    const float factor = weight / all.sum;
    for (int lane = static_cast<int>(threadIdx.x); lane < row_lanes; lane += loss_threads) {
      float value[lane_elements];
      widen(z[lane], value);
#pragma unroll
      for (int i = 0; i < lane_elements; ++i) {
        value[i] = factor * __expf(value[i] - all.largest);
        if (lane * lane_elements + i == static_cast<int>(target)) value[i] -= weight;
      }
      z[lane] = narrow(value);
    }
  }
}

constexpr int sum_threads = 1024;

__global__ void __launch_bounds__(sum_threads)
    add_losses_kernel(const float* row_losses, int rows, int positions, double* loss) {
  __shared__ double sums[sum_threads];
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < rows; i += sum_threads) {
    sum += static_cast<double>(row_losses[i]);
  }
  sums[threadIdx.x] = sum;
  for (int half = sum_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) *loss += sums[0] / positions;
}

__global__ void __launch_bounds__(row_threads)
    causal_softmax_forward_kernel(float factor, bf16* scores, int positions) {
  bf16* row = scores + std::int64_t{blockIdx.x} * positions;
  const int visible = static_cast<int>(blockIdx.x) % positions + 1;
  __shared__ float largest_of_warp[row_threads / warp_threads];
  float largest = -INFINITY;
  for (int j = static_cast<int>(threadIdx.x); j < visible; j += row_threads) {
    largest = fmaxf(largest, widen(row[j]));
  }
#pragma unroll
  for (int step = warp_threads / 2; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(whole_warp, largest, step));
  }
  if (threadIdx.x % warp_threads == 0) largest_of_warp[threadIdx.x / warp_threads] = largest;
  __syncthreads();
  for (const float other : largest_of_warp) largest = fmaxf(largest, other);
  float sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < visible; j += row_threads) {
    sum += __expf(factor * (widen(row[j]) - largest));
  }
  const float total = block_sum<row_threads>(sum);
  for (int j = static_cast<int>(threadIdx.x); j < positions; j += row_threads) {
    row[j] = narrow(j < visible ? __expf(factor * (widen(row[j]) - largest)) / total : 0.0F);
  }
}

__global__ void __launch_bounds__(row_threads)
    causal_softmax_backward_kernel(float factor, const bf16* probabilities, bf16* d_scores,
                                   int positions) {
  const bf16* p = probabilities + std::int64_t{blockIdx.x} * positions;
  bf16* d = d_scores + std::int64_t{blockIdx.x} * positions;
  const int visible = static_cast<int>(blockIdx.x) % positions + 1;
  float sum = 0;
  for (int j = static_cast<int>(threadIdx.x); j < visible; j += row_threads) {
    sum += widen(p[j]) * widen(d[j]);
  }
  const float mean = block_sum<row_threads>(sum);
  for (int j = static_cast<int>(threadIdx.x); j < positions; j += row_threads) {
    d[j] = narrow(j < visible ? factor * widen(p[j]) * (widen(d[j]) - mean) : 0.0F);
  }
}

}  // namespace

void layer_norm_forward(const Exec& exec, Rows<const bf16> x, Array<const bf16> weight,
                        Array<const bf16> bias, Rows<bf16> y, Array<float> mean,
                        Array<float> rstd) {
  const int rows = x.extent_int(0);
  if (rows == 0) return;
  with_lanes_a_thread(x.extent_int(1), [&](auto count) {
    layer_norm_forward_kernel<count><<<rows, row_threads, 0, exec.cuda_stream()>>>(
        lanes(x.data()), lanes(weight.data()), lanes(bias.data()), lanes(y.data()), mean.data(),
        rstd.data(), x.extent_int(1) / lane_elements);
  });
  check_launch("layer_norm_forward");
}

std::int64_t layer_norm_workspace(int width) {
  return std::int64_t{layer_norm_blocks()} * 2 * width;
}

void layer_norm_backward(const Exec& exec, Rows<const bf16> d_y, Rows<const bf16> x,
                         Array<const float> mean, Array<const float> rstd, Array<const bf16> weight,
                         Residual residual, Rows<bf16> d_x, Array<bf16> d_weight,
                         Array<bf16> d_bias, Array<float> partial) {
  const int rows = x.extent_int(0);
  const int width = x.extent_int(1);
  if (rows == 0) return;
  const int blocks = std::min(rows, layer_norm_blocks());
  const cudaStream_t stream = exec.cuda_stream();
  with_lanes_a_thread(width, [&](auto count) {
    const auto kernel = residual == Residual::add ? layer_norm_backward_kernel<count, true>
                                                  : layer_norm_backward_kernel<count, false>;
    kernel<<<blocks, row_threads, 0, stream>>>(lanes(d_y.data()), lanes(x.data()), mean.data(),
                                               rstd.data(), lanes(weight.data()), lanes(d_x.data()),
                                               partial.data(), rows, width / lane_elements);
  });
  layer_norm_sums_kernel<<<(2 * width + tile - 1) / tile, dim3(tile, tile), 0, stream>>>(
      partial.data(), blocks, width, d_weight.data(), d_bias.data());
  check_launch("layer_norm_backward");
}

void gelu_forward(const Exec& exec, Rows<const bf16> x, Rows<bf16> y) {
  const auto count = static_cast<std::int64_t>(x.size()) / lane_elements;
  if (count == 0) return;
  gelu_forward_kernel<<<blocks_of(count), element_threads, 0, exec.cuda_stream()>>>(
      lanes(x.data()), lanes(y.data()), count);
  check_launch("gelu_forward");
}

void join_biases(const Exec& exec, Array<const bf16> query, Array<const bf16> value,
                 Array<bf16> all) {
  join_biases_kernel<<<blocks_of(query.extent_int(0)), element_threads, 0, exec.cuda_stream()>>>(
      query.data(), value.data(), all.data(), query.extent_int(0));
  check_launch("join_biases");
}

void part_biases(const Exec& exec, Array<const bf16> all, Array<bf16> query, Array<bf16> value) {
  part_biases_kernel<<<blocks_of(query.extent_int(0)), element_threads, 0, exec.cuda_stream()>>>(
      all.data(), query.data(), value.data(), query.extent_int(0));
  check_launch("part_biases");
}

void embedding_forward(const Exec& exec, Rows<const Token> windows, Rows<const bf16> token,
                       Rows<const bf16> position, Rows<bf16> x) {
  if (x.extent_int(0) == 0) return;
  embedding_forward_kernel<<<x.extent_int(0), element_threads, 0, exec.cuda_stream()>>>(
      windows.data(), windows.extent_int(1) - 1, lanes(token.data()), lanes(position.data()),
      lanes(x.data()), x.extent_int(1) / lane_elements);
  check_launch("embedding_forward");
}

void embedding_backward(const Exec& exec, Rows<const Token> windows,
                        Array<const std::int32_t> order, Rows<const bf16> d_x, Rows<bf16> d_token,
                        Rows<bf16> d_position) {
  const int rows = d_x.extent_int(0);
  if (rows == 0) return;
  const int positions = windows.extent_int(1) - 1;
  const int row_lanes = d_x.extent_int(1) / lane_elements;
  const cudaStream_t stream = exec.cuda_stream();
  token_gradient_kernel<<<rows, element_threads, 0, stream>>>(windows.data(), positions,
                                                              order.data(), rows, lanes(d_x.data()),
                                                              lanes(d_token.data()), row_lanes);
  position_gradient_kernel<<<positions, element_threads, 0, stream>>>(
      windows.extent_int(0), positions, lanes(d_x.data()), lanes(d_position.data()), row_lanes);
  check_launch("embedding_backward");
}

void cross_entropy_forward(const Exec& exec, Rows<const bf16> logits, Rows<const Token> windows,
                           int first_row, Array<float> row_losses) {
  if (logits.extent_int(0) == 0) return;
  // Without gradients the kernel only reads.
  cross_entropy_kernel<false><<<logits.extent_int(0), loss_threads, 0, exec.cuda_stream()>>>(
      lanes(const_cast<bf16*>(logits.data())), windows.data(), windows.extent_int(1) - 1, first_row,
      nullptr, row_losses.data(), logits.extent_int(1) / lane_elements);
  check_launch("cross_entropy_forward");
}

void cross_entropy_forward_backward(const Exec& exec, Rows<bf16> logits, Rows<const Token> windows,
                                    int first_row, Scalar<const double, Exec> loss_scale,
                                    Array<float> row_losses) {
  if (logits.extent_int(0) == 0) return;
  cross_entropy_kernel<true><<<logits.extent_int(0), loss_threads, 0, exec.cuda_stream()>>>(
      lanes(logits.data()), windows.data(), windows.extent_int(1) - 1, first_row, loss_scale.data(),
      row_losses.data(), logits.extent_int(1) / lane_elements);
  check_launch("cross_entropy_forward_backward");
}

void add_losses(const Exec& exec, Array<const float> row_losses, int positions,
                Scalar<double, Exec> loss) {
  if (row_losses.extent_int(0) == 0) return;
  add_losses_kernel<<<1, sum_threads, 0, exec.cuda_stream()>>>(
      row_losses.data(), row_losses.extent_int(0), positions, loss.data());
  check_launch("add_losses");
}

void causal_softmax_forward(const Exec& exec, float factor, Rows<bf16> scores) {
  if (scores.extent_int(0) == 0) return;
  causal_softmax_forward_kernel<<<scores.extent_int(0), row_threads, 0, exec.cuda_stream()>>>(
      factor, scores.data(), scores.extent_int(1));
  check_launch("causal_softmax_forward");
}

void causal_softmax_backward(const Exec& exec, float factor, Rows<const bf16> probabilities,
                             Rows<bf16> d_scores) {
  if (d_scores.extent_int(0) == 0) return;
  causal_softmax_backward_kernel<<<d_scores.extent_int(0), row_threads, 0, exec.cuda_stream()>>>(
      factor, probabilities.data(), d_scores.data(), d_scores.extent_int(1));
  check_launch("causal_softmax_backward");
}

}  // namespace gpt::device
