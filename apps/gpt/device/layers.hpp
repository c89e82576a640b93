// SPDX-License-Identifier: Apache-2.0
#pragma once

// The layers of a GPT that are bound by memory, as kernels over bf16 with arithmetic in fp32.
// Shapes and letters are those of <gpt/layers.hpp>: B samples, T positions, N = B*T rows, C width,
// V vocabulary. C and V are multiples of lane_elements, C at most most_width.
//
// All functions are local, ordered on exec and allocate nothing; N = 0 launches nothing. Unlike
// those of the host they WRITE gradients of parameters, where they do not say otherwise. Sums have
// a fixed order: results are the same on every run. Cost: each array is read and written once,
// logits are read twice.

#include <gpt/device/views.hpp>
#include <gpt/shape.hpp>

#include <cstdint>

namespace gpt::device {

inline constexpr int most_width = 8192;

/// y = (x - mean) * rstd * weight + bias over each row.
/// \param[in]  x  (N, C)
/// \param[out] y  (N, C)
/// \param[out] mean, rstd  (N), for the backward pass
void layer_norm_forward(const Exec& exec, Rows<const bf16> x, Array<const bf16> weight,
                        Array<const bf16> bias, Rows<bf16> y, Array<float> mean, Array<float> rstd);

/// Elements of the workspace of layer_norm_backward.
[[nodiscard]] std::int64_t layer_norm_workspace(int width);

/// What there is in d_x before the backward pass of a layer norm.
enum class Residual : std::uint8_t {
  none,  ///< nothing: d_x is written
  add,   ///< the gradient of the residual path, to which the layer's is added
};

/// \param[in,out] d_x       (N, C)
/// \param[out]    d_weight, d_bias  (C)
/// \param[out]    partial   layer_norm_workspace(C) elements
void layer_norm_backward(const Exec& exec, Rows<const bf16> d_y, Rows<const bf16> x,
                         Array<const float> mean, Array<const float> rstd, Array<const bf16> weight,
                         Residual residual, Rows<bf16> d_x, Array<bf16> d_weight,
                         Array<bf16> d_bias, Array<float> partial);

/// y = GELU(x) in GPT-2's tanh form, elementwise.
void gelu_forward(const Exec& exec, Rows<const bf16> x, Rows<bf16> y);

/// The bias of queries, keys and values: keys have none.
/// \param[in]  query, value  (C)
/// \param[out] all           (3C)
void join_biases(const Exec& exec, Array<const bf16> query, Array<const bf16> value,
                 Array<bf16> all);
/// The reverse, for gradients.
void part_biases(const Exec& exec, Array<const bf16> all, Array<bf16> query, Array<bf16> value);

/// x(b*T + t) = token(windows(b, t)) + position(t).
/// \param[in]  windows  (B, T + 1) tokens below V
/// \param[in]  token    (V, C)
/// \param[in]  position (T, C)
/// \param[out] x        (N, C)
void embedding_forward(const Exec& exec, Rows<const Token> windows, Rows<const bf16> token,
                       Rows<const bf16> position, Rows<bf16> x);

/// Each sum is rounded once.
/// \param[in]     order       (N), of gpt::sort_by_token
/// \param[in,out] d_token     (V, C), ADDED
/// \param[out]    d_position  (T, C), written
void embedding_backward(const Exec& exec, Rows<const Token> windows,
                        Array<const std::int32_t> order, Rows<const bf16> d_x, Rows<bf16> d_token,
                        Rows<bf16> d_position);

/// Cross entropy of the next token in nats, of some rows of a batch.
/// \param[in]  logits      (rows, V)
/// \param[in]  windows     (B, T + 1); logits(i) is scored on the token after position
///                         (first_row + i) % T of sample (first_row + i) / T
/// \param[out] row_losses  (N), those of the rows are written
void cross_entropy_forward(const Exec& exec, Rows<const bf16> logits, Rows<const Token> windows,
                           int first_row, Array<float> row_losses);

/// The same losses, and in place of the logits d(loss_scale * sum over samples of the mean over a
/// sample's positions) / d(logits).
/// \param[in,out] logits      (rows, V)
/// \param[in]     loss_scale  in device memory
void cross_entropy_forward_backward(const Exec& exec, Rows<bf16> logits, Rows<const Token> windows,
                                    int first_row, Scalar<const double, Exec> loss_scale,
                                    Array<float> row_losses);

/// loss += sum of row_losses / positions.
void add_losses(const Exec& exec, Array<const float> row_losses, int positions,
                Scalar<double, Exec> loss);

/// Probabilities of causal attention in place of scores: softmax(factor * score) over the positions
/// up to the query's own, zero above.
/// \param[in,out] scores  (H*T, T)
void causal_softmax_forward(const Exec& exec, float factor, Rows<bf16> scores);

/// \param[in]     probabilities  (H*T, T)
/// \param[in,out] d_scores       (H*T, T), of probabilities, then of scores
void causal_softmax_backward(const Exec& exec, float factor, Rows<const bf16> probabilities,
                             Rows<bf16> d_scores);

}  // namespace gpt::device
