// SPDX-License-Identifier: Apache-2.0
#pragma once

// Layers of a GPT, forward and backward, as free functions over Kokkos Views.
//
// Shapes: B samples, T positions, N = B*T rows, C width, H heads of C/H columns, V vocabulary. Row
// b*T + t of an activation belongs to position t of sample b. Weights are (outputs, inputs). Views
// are LayoutRight and unmanaged.
//
// All functions are local, ordered on exec and allocate nothing; those with a matrix product block
// on host spaces. Backward functions ADD into gradients of parameters and write, or add where they
// say so, gradients of activations. B = 0 is fine and adds nothing. No atomics: results do not
// depend on the number of Kokkos' threads (a BLAS with threads of its own may add in another
// order).
//
// Call with the activation type named, so that arguments convert to the parameter types (const,
// unmanaged):
//   layer_norm_forward<float>(exec, x, weight, bias, y, mean, rstd);
// Compiled for float and double on the host execution space and on the default one.

#include <Kokkos_Core.hpp>
#include <gpt/rows.hpp>
#include <gpt/shape.hpp>

#include <cstdint>

namespace gpt {

/// Added to the variance under the root, as in GPT-2.
inline constexpr double layer_norm_epsilon = 1e-5;

/// y = (x - mean) * rstd * weight + bias over each row.
/// \param[in]  x  (N, C)
/// \param[out] y  (N, C)
/// \param[out] mean, rstd  (N), for the backward pass
template <class Real, class Exec>
void layer_norm_forward(const Exec& exec, Matrix<const Real, Exec> x,
                        Vector<const Real, Exec> weight, Vector<const Real, Exec> bias,
                        Matrix<Real, Exec> y, Vector<Real, Exec> mean, Vector<Real, Exec> rstd);

/// \param[in,out] d_x       (N, C); the gradient is ADDED: the residual path is there already
/// \param[in,out] d_weight, d_bias  (C), added
/// \param[out]    partial   workspace of column_sum_workspace(N, C) elements
template <class Real, class Exec>
void layer_norm_backward(const Exec& exec, Matrix<const Real, Exec> d_y, Matrix<const Real, Exec> x,
                         Vector<const Real, Exec> mean, Vector<const Real, Exec> rstd,
                         Vector<const Real, Exec> weight, Matrix<Real, Exec> d_x,
                         Vector<Real, Exec> d_weight, Vector<Real, Exec> d_bias,
                         Vector<Real, Exec> partial);

/// y = residual + x weight^T + bias.
/// \param[in]  x         (N, inputs)
/// \param[in]  weight    (outputs, inputs)
/// \param[in]  bias      (outputs), or empty: none
/// \param[in]  residual  (N, outputs), or empty: none
/// \param[out] y         (N, outputs), may be residual itself
template <class Real, class Exec>
void linear_forward(const Exec& exec, Matrix<const Real, Exec> x, Matrix<const Real, Exec> weight,
                    Vector<const Real, Exec> bias, Matrix<const Real, Exec> residual,
                    Matrix<Real, Exec> y);

/// \param[out]    d_x       (N, inputs), written; or empty: not wanted
/// \param[in,out] d_weight  (outputs, inputs), added
/// \param[in,out] d_bias    (outputs), added; or empty: none
/// \param[out]    partial   workspace of column_sum_workspace(N, outputs) elements, unused without
/// a bias
template <class Real, class Exec>
void linear_backward(const Exec& exec, Matrix<const Real, Exec> d_y, Matrix<const Real, Exec> x,
                     Matrix<const Real, Exec> weight, Matrix<Real, Exec> d_x,
                     Matrix<Real, Exec> d_weight, Vector<Real, Exec> d_bias,
                     Vector<Real, Exec> partial);

/// Queries, keys and values in one product. Keys have no bias: softmax does not change when a
/// constant is added to all scores of a query, so that its gradient would be rounding noise, which
/// Adam would scale up to full steps. \param[in]  weight  (3C, C), rows of queries, keys, values
/// \param[out] qkv     (N, 3C)
template <class Real, class Exec>
void qkv_forward(const Exec& exec, Matrix<const Real, Exec> x, Matrix<const Real, Exec> weight,
                 Vector<const Real, Exec> query_bias, Vector<const Real, Exec> value_bias,
                 Matrix<Real, Exec> qkv);

/// \param[out]    d_x      (N, C), written
/// \param[out]    partial  workspace of column_sum_workspace(N, C) elements
template <class Real, class Exec>
void qkv_backward(const Exec& exec, Matrix<const Real, Exec> d_qkv, Matrix<const Real, Exec> x,
                  Matrix<const Real, Exec> weight, Matrix<Real, Exec> d_x,
                  Matrix<Real, Exec> d_weight, Vector<Real, Exec> d_query_bias,
                  Vector<Real, Exec> d_value_bias, Vector<Real, Exec> partial);

/// Causal attention of H heads: y = softmax(q k^T / sqrt(C/H)) v for each head, over positions up
/// to the query's own. \param[in]  qkv            (N, 3C) \param[out] probabilities  (B*H*T, T),
/// zero above the diagonal \param[out] y              (N, C) \pre N is a multiple of T =
/// probabilities.extent(1); C is a multiple of heads
template <class Real, class Exec>
void attention_forward(const Exec& exec, int heads, Matrix<const Real, Exec> qkv,
                       Matrix<Real, Exec> probabilities, Matrix<Real, Exec> y);

/// \param[out] d_qkv     (N, 3C), written
/// \param[out] d_scores  workspace, shape of probabilities
template <class Real, class Exec>
void attention_backward(const Exec& exec, int heads, Matrix<const Real, Exec> d_y,
                        Matrix<const Real, Exec> qkv, Matrix<const Real, Exec> probabilities,
                        Matrix<Real, Exec> d_qkv, Matrix<Real, Exec> d_scores);

/// y = x Phi(x) in GPT-2's tanh form: x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
template <class Real, class Exec>
void gelu_forward(const Exec& exec, Matrix<const Real, Exec> x, Matrix<Real, Exec> y);

/// d_x = d_y * gelu'(x).
/// \param[out] d_x  written, may be d_y itself
template <class Real, class Exec>
void gelu_backward(const Exec& exec, Matrix<const Real, Exec> d_y, Matrix<const Real, Exec> x,
                   Matrix<Real, Exec> d_x);

/// y += x, elementwise.
template <class Real, class Exec>
void residual_add(const Exec& exec, Matrix<const Real, Exec> x, Matrix<Real, Exec> y);

/// x(b*T + t) = token(windows(b, t)) + position(t).
/// \param[in]  windows   (B, T + 1) tokens; the last column is a target only
/// \param[in]  token     (V, C)
/// \param[in]  position  (at least T, C)
/// \param[out] x         (N, C)
/// \pre all tokens are below V
template <class Real, class Exec>
void embedding_forward(const Exec& exec, Matrix<const Token, Exec> windows,
                       Matrix<const Real, Exec> token, Matrix<const Real, Exec> position,
                       Matrix<Real, Exec> x);

/// Writes the rows b*T + t of a batch sorted by their token, windows(b, t), and those of one token
/// by their number: what embedding_backward goes through. Local, on the host; allocates nothing.
/// \param[in]  windows  (B, T + 1)
/// \param[out] order    (N)
void sort_by_token(const Matrix<const Token, Kokkos::DefaultHostExecutionSpace>& windows,
                   const Vector<std::int32_t, Kokkos::DefaultHostExecutionSpace>& order);

/// Adds rows in the order of their index: work is N rows whatever V is.
/// \param[in]     order  (N), of sort_by_token
/// \param[in,out] d_token, d_position  added
template <class Real, class Exec>
void embedding_backward(const Exec& exec, Matrix<const Token, Exec> windows,
                        Vector<const std::int32_t, Exec> order, Matrix<const Real, Exec> d_x,
                        Matrix<Real, Exec> d_token, Matrix<Real, Exec> d_position);

/// Cross entropy of the next token in nats, mean over the positions of each sample.
/// \param[in]  logits   (N, V)
/// \param[in]  windows  (B, T + 1); row b*T + t is scored on windows(b, t + 1)
/// \param[out] row_losses  (N), workspace: loss of each position
/// \param[out] losses   (B), mean over a sample's positions
template <class Real, class Exec>
void cross_entropy_forward(const Exec& exec, Matrix<const Real, Exec> logits,
                           Matrix<const Token, Exec> windows, Vector<Real, Exec> row_losses,
                           Vector<double, Exec> losses);

/// The same losses, and in place of the logits d(loss_scale * sum over samples of the loss) /
/// d(logits). \param[in,out] logits      (N, V), becomes the gradient \param[in]     loss_scale
/// read on the device
template <class Real, class Exec>
void cross_entropy_forward_backward(const Exec& exec, Matrix<Real, Exec> logits,
                                    Matrix<const Token, Exec> windows,
                                    Scalar<const double, Exec> loss_scale,
                                    Vector<Real, Exec> row_losses, Vector<double, Exec> losses);

}  // namespace gpt
