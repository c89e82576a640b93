// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/base/execution.hpp>
#include <mics/optim/device_step_info.hpp>
#include <mics/optim/optimizer_config.hpp>
#include <mics/state/flat_model.hpp>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mics::optim {

/// What an array of optimizer state holds before the first step.
enum class InitialState : std::uint8_t {
  zeros,
  weights,  ///< the initial master weights
};

/// One array of optimizer state beside the master weights: as many elements, of the master dtype.
struct StateSpec {
  std::string name;  ///< its name in checkpoints: `exp_avg`; UTF-8, each once
  InitialState initial = InitialState::zeros;
};

/// One buffer's shard as an optimizer sees it: `count` elements of each array, host memory; for
/// the functions that enqueue, all of it but the span `states` itself is device memory. Gaps
/// between tensors are zero in every array.
struct Slice {
  const void* gradient = nullptr;      ///< sums over all ranks and micro-steps, `gradient_dtype`
  void* master_weights = nullptr;      ///< `master_dtype`
  std::span<void* const> states = {};  ///< `master_dtype`, in the order of Optimizer::states()
  void* compute = nullptr;             ///< `compute_dtype`; null if it is the master itself
  DType gradient_dtype = DType::fp32;
  DType master_dtype = DType::fp32;  ///< fp32 or fp64
  DType compute_dtype = DType::fp32;
  std::int64_t count = 0;
  std::span<const state::HyperRun> runs = {};          ///< cover [0, count)
  std::span<const state::TensorSegment> tensors = {};  ///< read where norms_per_tensor() is not 0
  /// What add_norms() added, summed over all shards of the buffer; read where norms_per_tensor() is
  /// not 0. (tensors of the buffer, norms_per_tensor())
  std::span<const double> norms = {};
};

/// What is the same for all elements of a step.
struct StepInfo {
  /// How often these elements were updated, this time included: of the bias corrections, and of
  /// what starts with the first gradient.
  std::int64_t step = 1;
  double learning_rate = 0;
  /// Instead of the configured ones, where a schedule cycles the momentum. Optimizers without betas
  /// ignore them.
  std::optional<std::array<double, 2>> betas = {};
  double gradient_scale = 1;  ///< clip factor / (loss scale * samples), applied to each gradient
};

/// Turns gradients into weights, element by element, over flat shards. Holds no arrays: whoever
/// calls it owns weights and states, so that they can be sharded, saved and moved.
///
/// A derived class brings its own formula. It must leave elements zero whose weight, gradient and
/// states are zero (gaps are such), and write the weights, rounded, to Slice::compute. Its
/// functions are called by one thread at a time for one object, on every rank with the same
/// StepInfo.
class Optimizer {
 public:
  Optimizer(const Optimizer&) = delete;
  Optimizer& operator=(const Optimizer&) = delete;
  virtual ~Optimizer() = default;

  /// One word: `adamw`.
  [[nodiscard]] virtual std::string_view name() const = 0;
  /// The arrays of state that it needs. Always the same for one object.
  [[nodiscard]] virtual std::vector<StateSpec> states() const = 0;
  /// One line that tells two optimizers apart to the last bit: what all ranks must agree on.
  [[nodiscard]] virtual std::string describe() const = 0;

  /// Sums over whole tensors that update() needs: 0 for most. If not 0, a step calls add_norms()
  /// for the shard, adds up over the shards, and then calls update().
  [[nodiscard]] virtual int norms_per_tensor() const { return 0; }
  /// Adds this shard's part of sum j of tensor i to `norms[i * norms_per_tensor() + j]`. Changes
  /// nothing of the slice. Local; blocks.
  /// \param[in,out] norms     as Slice::norms
  /// \param[out]    partials  at least norm_partials(slice.count, slice.tensors.size()) elements,
  ///                          overwritten
  virtual void add_norms(const Slice& slice, const StepInfo& info, std::span<double> norms,
                         std::span<double> partials) const;
  /// Elements of scratch memory that add_norms() needs for a slice of that size.
  [[nodiscard]] std::int64_t norm_partials(std::int64_t count, std::int64_t tensors) const;

  /// Updates weights and states, and writes the compute copy. Local; blocks.
  virtual void update(const Slice& slice, const StepInfo& info) const = 0;

  /// True if the two functions below work. The others are then never called for device memory.
  [[nodiscard]] virtual bool runs_on_device() const { return false; }
  /// As add_norms() and update(), for a slice in device memory and a step that the device decides:
  /// enqueued in `exec`, an instance of device::Space, and done by kernels that read `*info` when
  /// they run and leave everything as it is where `info->update` is 0. Local; do not block.
  /// \param[in,out] norms     device memory; as Slice::norms
  /// \param[out]    partials  device memory; as add_norms()
  /// \throws StateError if the optimizer does not run on a device
  virtual void enqueue_norms(const Execution& exec, const Slice& slice, const DeviceStepInfo* info,
                             double* norms, double* partials) const;
  virtual void enqueue_update(const Execution& exec, const Slice& slice,
                              const DeviceStepInfo* info) const;

 protected:
  Optimizer() = default;
};

/// The optimizer of a configuration. Its arithmetic is in the master dtype, whatever the
/// gradient's; bias corrections 1 - beta^t are computed in fp64. Results do not depend on the
/// number of threads, nor on how a buffer is cut into shards, but for LAMB, whose norms round
/// differently.
///
/// With g the scaled gradient, rate and decay multiplied by the factors of the tensor:
///  - adamw: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
///    w -= rate * ((m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon) + decay * w).
///    States exp_avg (m), exp_avg_sq (v). Source: Loshchilov, Hutter, ICLR 2019; epsilon outside
///    the root of the corrected second moment, as PyTorch has it.
///  - adam: decay * w added to g instead.
///  - sgd: g += decay * w; m = momentum * m + (1 - dampening) * g, at first m = g; nesterov: g +=
///    momentum * m, else g = m; w -= rate * g. State momentum_buffer, none without momentum. As
///    PyTorch has it.
///  - lion: w -= rate * (sign(b1 m + (1 - b1) g) + decay * w); m = b2 m + (1 - b2) g.
///    The sign of 0 is 0. State exp_avg. Source: Chen et al., NeurIPS 2023, algorithm 2.
///  - adagrad: g += decay * w; s = s + g^2; w -= rate * g / (sqrt(s) + epsilon). State sum. As
///    PyTorch has it, without a decay of the rate.
///  - lamb: m, v as adamw; u = m / (sqrt(v) + epsilon) + decay * w;
///    w -= rate * sqrt(1 - b2^t) / (1 - b1^t) * ratio * u;
///    ratio = |w| / |u| of the whole tensor, within [min_coefficient, max_coefficient], 1 where a
///    norm is 0. Source: You et al., ICLR 2020, in the form of
///    DeepSpeed:csrc/lamb/fused_lamb_cuda_kernel.cu, which does not correct the moments in u.
///
/// An epsilon below the smallest normal number of the master dtype counts as that number: 0 / 0
/// would fill gaps with NaN. `ema_decay` adds the state ema, at first the weights, in the same
/// pass.
///
/// They run on a device too, with the same formulas; there LAMB's norms round differently again.
///
/// Floor of adamw in fp32 with a 16-bit compute copy: 30 bytes an element (gradient 4, weights and
/// moments read and written 24, copy 2) over the memory's copy bandwidth.
/// \throws ConfigError for values that can never work
[[nodiscard]] std::unique_ptr<Optimizer> make_optimizer(const OptimizerConfig& config);

}  // namespace mics::optim
