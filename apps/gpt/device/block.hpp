// SPDX-License-Identifier: Apache-2.0
#pragma once

// A block of the GPT and its head on the device, put together from layers and products. Everything
// is ordered on exec; nothing allocates or waits.

#include <gpt/block.hpp>
#include <gpt/device/activations.hpp>

namespace gpt::device {

template <class T>
using EmbeddingViews = EmbeddingParameters<T, Exec>;
template <class T>
using BlockViews = BlockParameters<T, Exec>;
template <class T>
using FinalViews = FinalParameters<T, Exec>;

/// What the functions below run on.
struct Machine {
  const Exec& exec;
  Products& products;
  const GptShape& shape;
};

/// Reads saved.x, writes the rest of saved, and of scratch: normal, gelu, qkv_bias.
void block_activations(const Machine& machine, const BlockViews<const bf16>& p,
                       const BlockActivations& saved, const Scratch& scratch);

/// y = x + attention(norm(x)), then y + mlp(norm(y)).
/// \param[out] y  (N, C)
void block_forward(const Machine& machine, const BlockViews<const bf16>& p,
                   const BlockActivations& saved, const Scratch& scratch, Rows<bf16> y);

/// Turns scratch.d_x from the gradient of the block's output into that of its input. WRITES g.
void block_backward(const Machine& machine, const BlockViews<const bf16>& p,
                    const BlockActivations& saved, const BlockViews<bf16>& g,
                    const Scratch& scratch);

/// Where the head's losses go, and what it does with them.
struct HeadGradients {
  Scalar<const double, Exec> loss_scale;
  FinalViews<bf16> norm;  // written
  Rows<bf16> token;       // (V, C), written
};

/// Norm, logits and cross entropy, a part of the rows at a time; with `gradients` also their
/// backward passes, which write scratch.d_x. Adds the sum of the samples' losses to `loss`.
void head(const Machine& machine, const FinalViews<const bf16>& p, Rows<const bf16> token,
          Rows<const Token> windows, const Activations& activations, Scalar<double, Exec> loss,
          const HeadGradients* gradients);

}  // namespace gpt::device
