// SPDX-License-Identifier: Apache-2.0
#pragma once

// Causal attention of H heads, y = softmax(q k^T / sqrt(C/H)) v for each head, over positions up to
// the query's own. Two ways: on the tensor cores without ever writing scores to memory, for heads
// of 64 or 128 columns; and by batched products, for any width and as a reference.
//
// Row b*T + t of qkv (N, 3C) holds queries, keys and values of all heads. All functions are local,
// ordered on exec, allocate nothing and give the same results on every run; N = 0 is fine.

#include <gpt/device/products.hpp>
#include <gpt/device/views.hpp>

namespace gpt::device {

/// True if the functions without `plain` take heads of that many columns.
[[nodiscard]] constexpr bool is_fused_head_width(int width) { return width == 64 || width == 128; }

/// Cost: 4 C operations for each pair of positions that see each other; reads qkv, writes y.
/// \param[out] y         (N, C)
/// \param[out] log_sums  (N*H), base 2 logarithms of the softmax' denominators, for the backward
///                       pass; element (b*H + h)*T + t
void attention_forward(const Exec& exec, int heads, int positions, Rows<const bf16> qkv,
                       Rows<bf16> y, Array<float> log_sums);

/// Computes probabilities twice rather than add with atomics: 14 C operations for each such pair.
/// \param[in]  d_y, y    (N, C)
/// \param[out] d_qkv     (N, 3C)
/// \param[out] row_dots  workspace of N*H elements
void attention_backward(const Exec& exec, int heads, int positions, Rows<const bf16> d_y,
                        Rows<const bf16> y, Rows<const bf16> qkv, Array<const float> log_sums,
                        Rows<bf16> d_qkv, Array<float> row_dots);

/// \param[out] scores  workspace (H*T, T)
void plain_attention_forward(const Exec& exec, Products& products, int heads, Rows<const bf16> qkv,
                             Rows<bf16> y, Rows<bf16> scores);

/// \param[out] scores, d_scores  workspace, (H*T, T) each
void plain_attention_backward(const Exec& exec, Products& products, int heads, Rows<const bf16> d_y,
                              Rows<const bf16> qkv, Rows<bf16> d_qkv, Rows<bf16> scores,
                              Rows<bf16> d_scores);

}  // namespace gpt::device
