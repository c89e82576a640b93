// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gpt/device/attention.hpp>
#include <gpt/device/layers.hpp>
#include <gpt/device/products.hpp>
#include <gpt/device/views.hpp>
#include <gpt/shape.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace gpt::device {

/// What the backward pass of one block reads. Outputs of layer norms and of the GELU are computed
/// again, which costs less time than their memory is worth.
struct BlockActivations {
  Rows<bf16> x;                     // (N, C) input
  Array<float> ln1_mean, ln1_rstd;  // (N)
  Rows<bf16> qkv;                   // (N, 3C)
  Array<float> log_sums;            // (N*H)
  Rows<bf16> attention;             // (N, C)
  Rows<bf16> middle;                // (N, C) input of the second half
  Array<float> ln2_mean, ln2_rstd;  // (N)
  Rows<bf16> up;                    // (N, 4C) before the GELU
};

/// What layers use one after another.
struct Scratch {
  Rows<bf16> normal;            // (N, C) output of a layer norm
  Rows<bf16> gelu;              // (N, 4C)
  Rows<bf16> d_x;               // (N, C) gradient of the residual stream
  Rows<bf16> d_narrow;          // (N, C)
  Rows<bf16> d_wide;            // (N, 4C)
  Rows<bf16> d_qkv;             // (N, 3C), the memory of d_wide
  Array<bf16> logits;           // of as many rows as fit, the memory of gelu and d_wide
  Rows<bf16> scores, d_scores;  // (H*T, T), where attention needs them
  Array<bf16> qkv_bias;         // (3C), then its gradient
  Array<float> row_dots;        // (N*H)
  Array<float> partial;         // of layer norms
  Array<float> row_losses;      // (N)
  Array<double> loss;           // (1) of an evaluation
  Array<std::byte> products;    // workspace
};

/// One allocation of device memory for the activations and scratch of up to `batch` samples; views
/// of fewer samples use its first part.
///
/// Bytes, with 2 an element: a layer and row have 10 C elements, recomputed one C; once a row has
/// 12 C, of which the logits use 8 C. Example: 24 layers, width 2048, 8 samples of 1024 positions,
/// vocabulary 50304: 7.9 GiB.
class Activations {
 public:
  Activations(const GptShape& shape, int batch, Recompute recompute)
      : shape_(shape), capacity_(batch), recompute_(recompute) {
    memory_ = Kokkos::View<std::byte*, Exec::memory_space>(
        Kokkos::view_alloc("gpt::device::Activations", Kokkos::WithoutInitializing), place(batch));
    resize(batch);
  }

  /// Chooses the number of samples of the views. \throws std::invalid_argument above the capacity
  void resize(int batch) {
    if (batch < 0 || batch > capacity_) {
      throw std::invalid_argument("gpt::device::Activations: samples: expected 0 to " +
                                  std::to_string(capacity_) + ", found " + std::to_string(batch));
    }
    if (batch != batch_) place(batch);
    batch_ = batch;
  }

  [[nodiscard]] int batch() const { return batch_; }
  [[nodiscard]] int rows() const { return batch_ * shape_.positions; }
  [[nodiscard]] std::size_t bytes() const { return memory_.size(); }
  /// Activations of a block; with Recompute::yes all blocks share all but x.
  [[nodiscard]] const BlockActivations& layer(int index) const {
    return layers_.at(static_cast<std::size_t>(index));
  }
  /// True if they hold, after a forward pass, what the block's backward pass reads.
  [[nodiscard]] bool is_kept(int index) const {
    return recompute_ == Recompute::no || index + 1 == shape_.layers;
  }
  /// Where a block writes its output: the input of the next one, or of the head.
  [[nodiscard]] Rows<bf16> output(int index) const {
    return index + 1 < shape_.layers ? layer(index + 1).x : head_.x;
  }
  struct Head {
    Rows<bf16> x;             // (N, C) output of the last block
    Array<float> mean, rstd;  // (N)
  };
  [[nodiscard]] const Head& head() const { return head_; }
  [[nodiscard]] const Scratch& scratch() const { return scratch_; }
  /// Rows of logits that are computed at a time.
  [[nodiscard]] int logits_rows() const { return logits_rows_; }

 private:
  // Lays all views into the memory; returns its bytes. Before it exists, only counts.
  std::size_t place(int batch) {
    constexpr std::size_t alignment = 256;
    std::size_t used = 0;
    const auto take = [&]<class T>(T* /*type*/, std::int64_t count) {
      const std::size_t start = used;
      used = (used + static_cast<std::size_t>(count) * sizeof(T) + alignment - 1) / alignment *
             alignment;
      return memory_.data() == nullptr ? nullptr : reinterpret_cast<T*>(memory_.data() + start);
    };
    const auto rows = [&](std::int64_t count, std::int64_t columns) {
      return Rows<bf16>(take(static_cast<bf16*>(nullptr), count * columns),
                        static_cast<std::size_t>(count), static_cast<std::size_t>(columns));
    };
    const auto floats = [&](std::int64_t count) {
      return Array<float>(take(static_cast<float*>(nullptr), count),
                          static_cast<std::size_t>(count));
    };
    const std::int64_t c = shape_.width;
    const std::int64_t n = std::int64_t{batch} * shape_.positions;
    layers_.resize(static_cast<std::size_t>(shape_.layers));
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      BlockActivations& layer = layers_[i];
      if (i > 0 && recompute_ == Recompute::yes) {
        layer = layers_.front();
        layer.x = rows(n, c);
        continue;
      }
      layer.x = rows(n, c);
      layer.ln1_mean = floats(n);
      layer.ln1_rstd = floats(n);
      layer.qkv = rows(n, 3 * c);
      layer.log_sums = floats(n * shape_.heads);
      layer.attention = rows(n, c);
      layer.middle = rows(n, c);
      layer.ln2_mean = floats(n);
      layer.ln2_rstd = floats(n);
      layer.up = rows(n, 4 * c);
    }
    head_ = {rows(n, c), floats(n), floats(n)};

    Scratch& s = scratch_;
    s.normal = rows(n, c);
    s.d_x = rows(n, c);
    s.d_narrow = rows(n, c);
    place_logits(n, take(static_cast<bf16*>(nullptr), logits_elements(n)));
    const bool plain = !is_fused_head_width(shape_.width / shape_.heads);
    const std::int64_t t = shape_.positions;
    s.scores = rows(plain ? shape_.heads * t : 0, t);
    s.d_scores = rows(plain ? shape_.heads * t : 0, t);
    s.qkv_bias = Array<bf16>(take(static_cast<bf16*>(nullptr), 3 * c), 3 * shape_.width);
    s.row_dots = floats(n * shape_.heads);
    s.partial = floats(layer_norm_workspace(shape_.width));
    s.row_losses = floats(n);
    s.loss = Array<double>(take(static_cast<double*>(nullptr), 1), 1);
    s.products = Array<std::byte>(take(static_cast<std::byte*>(nullptr), Products::workspace_bytes),
                                  Products::workspace_bytes);
    return used;
  }

  // Room for the largest arrays of a block's backward pass, and for the logits of 2048 rows and of
  // a whole sample.
  [[nodiscard]] std::int64_t logits_elements(std::int64_t rows) const {
    const std::int64_t least = std::min<std::int64_t>(rows, std::max(2048, shape_.positions));
    return std::max(8 * rows * shape_.width, least * shape_.vocabulary);
  }
  void place_logits(std::int64_t n, bf16* memory) {
    const auto elements = logits_elements(n);
    const auto rows = static_cast<std::size_t>(n);
    const auto wide = static_cast<std::size_t>(4 * shape_.width);
    Scratch& s = scratch_;
    s.gelu = Rows<bf16>(memory, rows, wide);
    bf16* behind = memory == nullptr ? nullptr : memory + rows * wide;
    s.d_wide = Rows<bf16>(behind, rows, wide);
    s.d_qkv = Rows<bf16>(behind, rows, wide / 4 * 3);
    s.logits = Array<bf16>(memory, static_cast<std::size_t>(elements));
    // Equal parts, of whole tiles of the products.
    constexpr std::int64_t tile = 128;
    const std::int64_t most = elements / shape_.vocabulary;
    const std::int64_t parts = most == 0 ? 1 : (n + most - 1) / most;
    const std::int64_t part = parts == 0 ? 0 : (n + parts - 1) / parts;
    logits_rows_ = static_cast<int>(
        std::min(std::max<std::int64_t>(1, most), (part + tile - 1) / tile * tile));
  }

  GptShape shape_;
  int capacity_;
  Recompute recompute_;
  int batch_ = -1;
  Kokkos::View<std::byte*, Exec::memory_space> memory_;
  std::vector<BlockActivations> layers_;
  Head head_;
  Scratch scratch_;
  int logits_rows_ = 1;
};

}  // namespace gpt::device
