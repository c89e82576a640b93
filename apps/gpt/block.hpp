// SPDX-License-Identifier: Apache-2.0
#pragma once

// A GPT put together from layers: embedding, pre-norm blocks, tied head. Parameters and gradients
// come in as structs of views, one struct a unit; activations are allocated once. Nothing here
// knows where parameters are kept.

#include <Kokkos_Core.hpp>
#include <gpt/layers.hpp>
#include <gpt/shape.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

namespace gpt {

// Views of one unit, in the order of its table in GptShape::units(). T is `const P` for parameters,
// `P` for gradients. visit(f) calls f(view) for each member in that order.

template <class T, class Exec>
struct EmbeddingParameters {
  static constexpr int count = 2;
  Matrix<T, Exec> token;     // (V, C), also the head
  Matrix<T, Exec> position;  // (T, C)

  template <class F>
  void visit(F&& f) {
    f(token);
    f(position);
  }
};

template <class T, class Exec>
struct BlockParameters {
  static constexpr int count = 13;
  Vector<T, Exec> ln1_weight, ln1_bias;    // (C)
  Matrix<T, Exec> qkv_weight;              // (3C, C)
  Vector<T, Exec> query_bias, value_bias;  // (C)
  Matrix<T, Exec> proj_weight;             // (C, C)
  Vector<T, Exec> proj_bias;               // (C)
  Vector<T, Exec> ln2_weight, ln2_bias;    // (C)
  Matrix<T, Exec> up_weight;               // (4C, C)
  Vector<T, Exec> up_bias;                 // (4C)
  Matrix<T, Exec> down_weight;             // (C, 4C)
  Vector<T, Exec> down_bias;               // (C)

  template <class F>
  void visit(F&& f) {
    f(ln1_weight);
    f(ln1_bias);
    f(qkv_weight);
    f(query_bias);
    f(value_bias);
    f(proj_weight);
    f(proj_bias);
    f(ln2_weight);
    f(ln2_bias);
    f(up_weight);
    f(up_bias);
    f(down_weight);
    f(down_bias);
  }
};

template <class T, class Exec>
struct FinalParameters {
  static constexpr int count = 2;
  Vector<T, Exec> weight, bias;  // (C)

  template <class F>
  void visit(F&& f) {
    f(weight);
    f(bias);
  }
};

/// What the backward pass of one block reads.
template <class Real, class Exec>
struct BlockActivations {
  Matrix<Real, Exec> x;                   // (N, C) input
  Vector<Real, Exec> ln1_mean, ln1_rstd;  // (N)
  Matrix<Real, Exec> ln1;                 // (N, C)
  Matrix<Real, Exec> qkv;                 // (N, 3C)
  Matrix<Real, Exec> probabilities;       // (B*H*T, T)
  Matrix<Real, Exec> attention;           // (N, C)
  Matrix<Real, Exec> middle;              // (N, C) input of the second half
  Vector<Real, Exec> ln2_mean, ln2_rstd;  // (N)
  Matrix<Real, Exec> ln2;                 // (N, C)
  Matrix<Real, Exec> up, gelu;            // (N, 4C)
};

template <class Real, class Exec>
struct HeadActivations {
  Matrix<Real, Exec> x;           // (N, C) output of the last block
  Vector<Real, Exec> mean, rstd;  // (N)
  Matrix<Real, Exec> normalized;  // (N, C)
  Matrix<Real, Exec> logits;      // (N, V), then their gradient
  Vector<Real, Exec> row_losses;  // (N)
};

/// Scratch of the backward pass, shared by all layers.
template <class Real, class Exec>
struct Workspace {
  Matrix<Real, Exec> d_x;       // (N, C) gradient of the residual stream
  Matrix<Real, Exec> d_narrow;  // (N, C)
  Matrix<Real, Exec> d_wide;    // (N, 4C)
  Matrix<Real, Exec> d_qkv;     // (N, 3C), the memory of d_wide
  Matrix<Real, Exec> d_scores;  // (B*H*T, T)
  Vector<Real, Exec> partial;   // column sums
};

/// One allocation for the activations and scratch of up to `batch` samples; views of fewer samples
/// use its first part.
///
/// Elements a layer and row (position of a sample): 16 C + H T + 4; once: 8 C + V + H T + 3 and 4 C
/// for each 64 rows. Recomputed, a layer and row have C, and 15 C + H T + 4 come once. Example: 4
/// layers, width 128, 4 heads, 128 positions, 6 samples, float: 37.0 MB, recomputed 14.6 MB.
template <class Real, class Exec>
class Activations {
 public:
  Activations(const GptShape& shape, int batch, Recompute recompute = Recompute::no)
      : shape_(shape), capacity_(batch), recompute_(recompute) {
    shape.validate();
    arena_ = Kokkos::View<Real*, typename Exec::memory_space>(
        Kokkos::view_alloc("gpt::Activations::arena", Kokkos::WithoutInitializing), place(batch));
    losses_ = Kokkos::View<double*, typename Exec::memory_space>("gpt::Activations::losses", batch);
    resize(batch);
  }

  /// Chooses the number of samples of the views. Allocates nothing on the device.
  /// \throws std::invalid_argument above the capacity
  void resize(int batch) {
    if (batch < 0 || batch > capacity_) {
      throw std::invalid_argument("gpt::Activations: samples: expected 0 to " +
                                  std::to_string(capacity_) + ", found " + std::to_string(batch));
    }
    batch_ = batch;
    place(batch);
  }

  [[nodiscard]] const GptShape& shape() const { return shape_; }
  [[nodiscard]] int batch() const { return batch_; }
  [[nodiscard]] int capacity() const { return capacity_; }
  [[nodiscard]] std::size_t bytes() const {
    return arena_.size() * sizeof(Real) + losses_.size() * sizeof(double);
  }
  [[nodiscard]] const BlockActivations<Real, Exec>& layer(int index) const {
    return layers_.at(static_cast<std::size_t>(index));
  }
  /// True if the views of layer `index` hold, after a forward pass, what its backward pass reads:
  /// of recomputed layers the last one's do.
  [[nodiscard]] bool is_kept(int index) const {
    return recompute_ == Recompute::no || index + 1 == shape_.layers;
  }
  /// Where layer `index` writes its output: the input of the next one, or of the head.
  [[nodiscard]] Matrix<Real, Exec> output(int index) const {
    return index + 1 < shape_.layers ? layer(index + 1).x : head_.x;
  }
  [[nodiscard]] const HeadActivations<Real, Exec>& head() const { return head_; }
  [[nodiscard]] const Workspace<Real, Exec>& workspace() const { return workspace_; }
  [[nodiscard]] Vector<double, Exec> losses() const {
    return Vector<double, Exec>(losses_.data(), batch_);
  }

 private:
  /// Lays all views into the arena; returns the elements they take. Before the arena exists, only
  /// counts.
  std::int64_t place(int batch) {
    std::int64_t used = 0;
    const auto take = [&](std::int64_t count) {
      constexpr std::int64_t alignment = 16;  // a cache line of floats
      const std::int64_t start = used;
      used = (used + count + alignment - 1) / alignment * alignment;
      return arena_.data() == nullptr ? nullptr : arena_.data() + start;
    };
    const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
      return Matrix<Real, Exec>(take(rows * columns), static_cast<std::size_t>(rows),
                                static_cast<std::size_t>(columns));
    };
    const auto vector = [&](std::int64_t count) {
      return Vector<Real, Exec>(take(count), static_cast<std::size_t>(count));
    };
    const std::int64_t c = shape_.width;
    const std::int64_t t = shape_.positions;
    const std::int64_t rows = batch * t;
    const std::int64_t score_rows = rows * shape_.heads;
    layers_.resize(static_cast<std::size_t>(shape_.layers));
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      BlockActivations<Real, Exec>& layer = layers_[i];
      if (i > 0 && recompute_ == Recompute::yes) {
        layer = layers_.front();
        layer.x = matrix(rows, c);
        continue;
      }
      layer.x = matrix(rows, c);
      layer.ln1_mean = vector(rows);
      layer.ln1_rstd = vector(rows);
      layer.ln1 = matrix(rows, c);
      layer.qkv = matrix(rows, 3 * c);
      layer.probabilities = matrix(score_rows, t);
      layer.attention = matrix(rows, c);
      layer.middle = matrix(rows, c);
      layer.ln2_mean = vector(rows);
      layer.ln2_rstd = vector(rows);
      layer.ln2 = matrix(rows, c);
      layer.up = matrix(rows, 4 * c);
      layer.gelu = matrix(rows, 4 * c);
    }
    head_.x = matrix(rows, c);
    head_.mean = vector(rows);
    head_.rstd = vector(rows);
    head_.normalized = matrix(rows, c);
    head_.logits = matrix(rows, shape_.vocabulary);
    head_.row_losses = vector(rows);
    workspace_.d_x = matrix(rows, c);
    workspace_.d_narrow = matrix(rows, c);
    workspace_.d_wide = matrix(rows, 4 * c);
    workspace_.d_qkv = Matrix<Real, Exec>(workspace_.d_wide.data(), static_cast<std::size_t>(rows),
                                          static_cast<std::size_t>(3 * c));
    workspace_.d_scores = matrix(score_rows, t);
    workspace_.partial = vector(column_sum_workspace(rows, 4 * c));
    return used;
  }

  GptShape shape_;
  int capacity_ = 0;
  Recompute recompute_;
  int batch_ = 0;
  Kokkos::View<Real*, typename Exec::memory_space> arena_;
  Kokkos::View<double*, typename Exec::memory_space> losses_;
  std::vector<BlockActivations<Real, Exec>> layers_;
  HeadActivations<Real, Exec> head_;
  Workspace<Real, Exec> workspace_;
};

/// All of block_forward but its last product: reads saved.x, writes the rest of saved. What a
/// backward pass needs where it was not kept; the same bits each time.
template <class Real, class Exec>
void block_activations(const Exec& exec, int heads,
                       const std::type_identity_t<BlockParameters<const Real, Exec>>& p,
                       const std::type_identity_t<BlockActivations<Real, Exec>>& saved) {
  layer_norm_forward<Real>(exec, saved.x, p.ln1_weight, p.ln1_bias, saved.ln1, saved.ln1_mean,
                           saved.ln1_rstd);
  qkv_forward<Real>(exec, saved.ln1, p.qkv_weight, p.query_bias, p.value_bias, saved.qkv);
  attention_forward<Real>(exec, heads, saved.qkv, saved.probabilities, saved.attention);
  linear_forward<Real>(exec, saved.attention, p.proj_weight, p.proj_bias, saved.x, saved.middle);
  layer_norm_forward<Real>(exec, saved.middle, p.ln2_weight, p.ln2_bias, saved.ln2, saved.ln2_mean,
                           saved.ln2_rstd);
  linear_forward<Real>(exec, saved.ln2, p.up_weight, p.up_bias, Matrix<const Real, Exec>(),
                       saved.up);
  gelu_forward<Real>(exec, saved.up, saved.gelu);
}

/// y = x + attention(norm(x)), then y + mlp(norm(y)). Reads saved.x, writes the rest of saved, and
/// y. \param[out] y  (N, C)
template <class Real, class Exec>
void block_forward(const Exec& exec, int heads,
                   const std::type_identity_t<BlockParameters<const Real, Exec>>& p,
                   const std::type_identity_t<BlockActivations<Real, Exec>>& saved,
                   std::type_identity_t<Matrix<Real, Exec>> y) {
  block_activations<Real>(exec, heads, p, saved);
  linear_forward<Real>(exec, saved.gelu, p.down_weight, p.down_bias, saved.middle, y);
}

/// Turns work.d_x from the gradient of the block's output into that of its input; adds into g.
template <class Real, class Exec>
void block_backward(const Exec& exec, int heads,
                    const std::type_identity_t<BlockParameters<const Real, Exec>>& p,
                    const std::type_identity_t<BlockActivations<Real, Exec>>& saved,
                    const std::type_identity_t<BlockParameters<Real, Exec>>& g,
                    const std::type_identity_t<Workspace<Real, Exec>>& work) {
  linear_backward<Real>(exec, work.d_x, saved.gelu, p.down_weight, work.d_wide, g.down_weight,
                        g.down_bias, work.partial);
  gelu_backward<Real>(exec, work.d_wide, saved.up, work.d_wide);
  linear_backward<Real>(exec, work.d_wide, saved.ln2, p.up_weight, work.d_narrow, g.up_weight,
                        g.up_bias, work.partial);
  layer_norm_backward<Real>(exec, work.d_narrow, saved.middle, saved.ln2_mean, saved.ln2_rstd,
                            p.ln2_weight, work.d_x, g.ln2_weight, g.ln2_bias, work.partial);
  linear_backward<Real>(exec, work.d_x, saved.attention, p.proj_weight, work.d_narrow,
                        g.proj_weight, g.proj_bias, work.partial);
  attention_backward<Real>(exec, heads, work.d_narrow, saved.qkv, saved.probabilities, work.d_qkv,
                           work.d_scores);
  qkv_backward<Real>(exec, work.d_qkv, saved.ln1, p.qkv_weight, work.d_narrow, g.qkv_weight,
                     g.query_bias, g.value_bias, work.partial);
  layer_norm_backward<Real>(exec, work.d_narrow, saved.x, saved.ln1_mean, saved.ln1_rstd,
                            p.ln1_weight, work.d_x, g.ln1_weight, g.ln1_bias, work.partial);
}

/// Logits of the next token: norm of the residual stream times the token embedding.
template <class Real, class Exec>
void head_forward(const Exec& exec,
                  const std::type_identity_t<FinalParameters<const Real, Exec>>& p,
                  std::type_identity_t<Matrix<const Real, Exec>> token,
                  const std::type_identity_t<HeadActivations<Real, Exec>>& saved) {
  layer_norm_forward<Real>(exec, saved.x, p.weight, p.bias, saved.normalized, saved.mean,
                           saved.rstd);
  linear_forward<Real>(exec, saved.normalized, token, Vector<const Real, Exec>(),
                       Matrix<const Real, Exec>(), saved.logits);
}

/// Writes work.d_x from the gradient that cross_entropy_forward_backward left in saved.logits; adds
/// into g and d_token.
template <class Real, class Exec>
void head_backward(const Exec& exec,
                   const std::type_identity_t<FinalParameters<const Real, Exec>>& p,
                   std::type_identity_t<Matrix<const Real, Exec>> token,
                   const std::type_identity_t<HeadActivations<Real, Exec>>& saved,
                   const std::type_identity_t<FinalParameters<Real, Exec>>& g,
                   std::type_identity_t<Matrix<Real, Exec>> d_token,
                   const std::type_identity_t<Workspace<Real, Exec>>& work) {
  linear_backward<Real>(exec, saved.logits, saved.normalized, token, work.d_narrow, d_token,
                        Vector<Real, Exec>(), work.partial);
  Kokkos::deep_copy(exec, work.d_x, Real(0));
  layer_norm_backward<Real>(exec, work.d_narrow, saved.x, saved.mean, saved.rstd, p.weight,
                            work.d_x, g.weight, g.bias, work.partial);
}

}  // namespace gpt
