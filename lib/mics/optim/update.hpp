// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/state/flat_model.hpp>

#include <cstdint>
#include <span>

namespace mics::optim {

/// A slice of one buffer as an optimizer sees it: `count` elements of each array, host memory.
struct Slice {
  const void* gradient = nullptr;  ///< sums over all ranks and micro-steps, `gradient_dtype`
  void* master_weights = nullptr;  ///< `master_dtype`
  void* exp_avg = nullptr;         ///< `master_dtype`; null where the optimizer has none
  void* exp_avg_sq = nullptr;      ///< `master_dtype`; null where the optimizer has none
  void* compute = nullptr;         ///< `compute_dtype`; null if it is the master itself
  DType gradient_dtype = DType::fp32;
  DType master_dtype = DType::fp32;
  DType compute_dtype = DType::fp32;
  std::int64_t count = 0;
  std::span<const state::HyperRun> runs;  ///< cover [0, count)
};

/// What is the same for all elements of a step.
struct AdamW {
  double learning_rate = 0;
  double beta1 = 0;
  double beta2 = 0;
  double epsilon = 0;
  double weight_decay = 0;
  double bias_correction1 = 1;  ///< 1 - beta1^t
  double bias_correction2 = 1;  ///< 1 - beta2^t
  double gradient_scale = 1;    ///< clip factor / (loss scale * samples)
};

/// w -= lr * ((m / b1) / (sqrt(v / b2) + eps) + decay * w), with m and v updated first; the weights
/// rounded to the compute dtype are written in the same pass.
/// Arithmetic in the master dtype. Local; blocks. Floor for fp32 with a 16-bit compute copy: 30
/// bytes an element (gradient 4, weights and moments read and written 24, copy 2) over the memory's
/// copy bandwidth.
/// Source: Loshchilov, Hutter, "Decoupled weight decay regularization", ICLR 2019; epsilon outside
/// the root of the corrected second moment, as PyTorch has it.
void update(const AdamW& adamw, const Slice& slice);

struct Sgd {
  double learning_rate = 0;
  double weight_decay = 0;
  double gradient_scale = 1;
};

/// w -= lr * (g + decay * w). Arithmetic, floor and copy as for AdamW, without moments.
void update(const Sgd& sgd, const Slice& slice);

}  // namespace mics::optim
