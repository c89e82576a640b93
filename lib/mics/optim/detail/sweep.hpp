// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/for_blocks.hpp>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <type_traits>

namespace mics::optim::detail {

/// States of an optimizer of mics, the average of the weights included.
inline constexpr std::size_t max_states = 3;

/// Elements with the same hyper-parameters, and of one tensor where the sweep is by tensor.
/// Pointers are to the first of them; T is the master dtype.
template <class T>
struct Piece {
  const T* gradient = nullptr;
  T* weights = nullptr;
  std::array<T*, max_states> states = {};
  std::int64_t count = 0;
  double weight_decay_factor = 1;
  double learning_rate_factor = 1;
  std::int64_t segment = -1;  ///< index in Slice::tensors; -1 if not by tensor
};

/// What optimizers compute with whose weight decay is a part of the gradient, in the master dtype.
template <class T>
struct Decayed {
  T rate;   ///< learning rate
  T decay;  ///< weight decay
  T scale;  ///< of stored gradients

  Decayed(const Piece<T>& piece, double learning_rate, double weight_decay, double gradient_scale)
      : rate(static_cast<T>(learning_rate * piece.learning_rate_factor)),
        decay(static_cast<T>(weight_decay * piece.weight_decay_factor)),
        scale(static_cast<T>(gradient_scale)) {}
  [[nodiscard]] T gradient(T stored, T weight) const { return stored * scale + decay * weight; }
};

enum class Cut : std::uint8_t { runs, tensors };

/// Gradients are converted to the master dtype so many at a time, in first-level cache.
inline constexpr std::int64_t chunk_count = 1024;

// Calls `body(part, index)` for the ranges of `table` that meet [begin, end), cut to it.
template <class Range, class Body>
void for_ranges(std::span<const Range> table, std::int64_t begin, std::int64_t end,
                const Body& body) {
  auto range = std::partition_point(table.begin(), table.end(),
                                    [=](const Range& r) { return r.end <= begin; });
  for (; range != table.end() && range->begin < end; ++range) {
    Range part = *range;
    part.begin = std::max(begin, part.begin);
    part.end = std::min(end, part.end);
    body(part, range - table.begin());
  }
}

// Calls `body(piece)` for the pieces of [begin, end), gradients converted where they are not T.
template <class T, class Gradient, Cut cut, class Body>
void for_pieces(const Slice& slice, std::int64_t begin, std::int64_t end, const Body& body) {
  const auto piece_of = [&](const state::HyperRun& run, std::int64_t segment, std::int64_t from,
                            std::int64_t to, const T* gradient) {
    Piece<T> piece;
    piece.gradient = gradient;
    piece.weights = static_cast<T*>(slice.master_weights) + from;
    for (std::size_t s = 0; s < std::min(max_states, slice.states.size()); ++s) {
      piece.states[s] = static_cast<T*>(slice.states[s]) + from;
    }
    piece.count = to - from;
    piece.weight_decay_factor = run.weight_decay_factor;
    piece.learning_rate_factor = run.learning_rate_factor;
    piece.segment = segment;
    body(piece, from);
  };
  const auto converted = [&](const state::HyperRun& run, std::int64_t segment, std::int64_t from,
                             std::int64_t to) {
    const auto* gradient = static_cast<const Gradient*>(slice.gradient);
    if constexpr (std::is_same_v<T, Gradient>) {
      piece_of(run, segment, from, to, gradient + from);
    } else {
      std::array<T, chunk_count> chunk;
      for (; from < to; from += chunk_count) {
        const std::int64_t part = std::min(chunk_count, to - from);
        for (std::int64_t i = 0; i < part; ++i) {
          chunk[static_cast<std::size_t>(i)] = static_cast<T>(gradient[from + i]);
        }
        piece_of(run, segment, from, from + part, chunk.data());
      }
    }
  };
  for_ranges(slice.runs, begin, end, [&](const state::HyperRun& run, std::int64_t) {
    if constexpr (cut == Cut::runs) {
      converted(run, -1, run.begin, run.end);
    } else {
      for_ranges(slice.tensors, run.begin, run.end,
                 [&](const state::TensorSegment& tensor, std::int64_t index) {
                   converted(run, index, tensor.begin, tensor.end);
                 });
    }
  });
}

// Calls `f(TypeTag<master>, TypeTag<gradient>)`.
template <class F>
void visit_types(const Slice& slice, const F& f) {
  visit_arithmetic(slice.master_dtype, [&](auto master) {
    visit(slice.gradient_dtype, [&](auto gradient) { f(master, gradient); });
  });
}

/// Rounds updated weights to the compute dtype while they are in cache. The same bits on every CPU.
void write_compute(const float* weights, void* compute, DType dtype, std::int64_t begin,
                   std::int64_t count);
void write_compute(const double* weights, void* compute, DType dtype, std::int64_t begin,
                   std::int64_t count);

/// One pass over a slice: `rule(piece)` for each piece, then the average of the weights, which is
/// the last state, then the compute copy. In parallel over blocks; blocks until all are done.
/// \tparam Rule  called with Piece<float> or Piece<double>; copied to each thread
template <Cut cut = Cut::runs, class Rule>
void sweep(const char* label, const Slice& slice, std::optional<double> ema_decay,
           const Rule& rule) {
  visit_types(slice, [&](auto master, auto gradient) {
    using T = typename decltype(master)::type;
    using Gradient = typename decltype(gradient)::type;
    const bool averaged = ema_decay.has_value();
    const auto keep = static_cast<T>(ema_decay.value_or(1));
    const auto take = static_cast<T>(1 - ema_decay.value_or(1));
    state::for_blocks(label, slice.count, [=](std::int64_t begin, std::int64_t end) {
      for_pieces<T, Gradient, cut>(
          slice, begin, end, [&](const Piece<T>& piece, std::int64_t from) {
            rule(piece);
            const T* const weights = piece.weights;
            if (averaged) {
              T* const ema = piece.states[slice.states.size() - 1];
#pragma GCC ivdep
              for (std::int64_t i = 0; i < piece.count; ++i) {
                ema[i] = keep * ema[i] + take * weights[i];
              }
            }
            if (slice.compute != nullptr) {
              write_compute(weights, slice.compute, slice.compute_dtype, from, piece.count);
            }
          });
    });
  });
}

}  // namespace mics::optim::detail
