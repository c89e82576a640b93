// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/sum_of_squares.hpp>
#include <mics/optim/detail/sweep.hpp>

#include <cmath>

namespace mics::optim::detail {
namespace {

// The moments after the step and the direction u of one element.
template <class T>
struct Direction {
  T exp_avg;
  T exp_avg_sq;
  T u;
};

// What the formula of u depends on, beside the element.
struct Numbers {
  std::array<double, 2> betas;
  double epsilon;
  double weight_decay;
  double gradient_scale;
};

// The formula of u in the master dtype, the same in both passes.
template <class T>
class Formula {
 public:
  Formula(const Numbers& numbers, const Piece<T>& piece)
      : beta1_(static_cast<T>(numbers.betas[0])),
        beta2_(static_cast<T>(numbers.betas[1])),
        one_minus_beta1_(static_cast<T>(1 - numbers.betas[0])),
        one_minus_beta2_(static_cast<T>(1 - numbers.betas[1])),
        epsilon_(at_least_normal<T>(numbers.epsilon)),
        scale_(static_cast<T>(numbers.gradient_scale)),
        decay_(static_cast<T>(numbers.weight_decay * piece.weight_decay_factor)) {}

  [[nodiscard]] Direction<T> operator()(T gradient, T exp_avg, T exp_avg_sq, T weight) const {
    const T g = gradient * scale_;
    const T m = beta1_ * exp_avg + one_minus_beta1_ * g;
    const T v = beta2_ * exp_avg_sq + one_minus_beta2_ * g * g;
    return {m, v, m / (std::sqrt(v) + epsilon_) + decay_ * weight};
  }

 private:
  T beta1_;
  T beta2_;
  T one_minus_beta1_;
  T one_minus_beta2_;
  T epsilon_;
  T scale_;
  T decay_;
};

class Lamb final : public BuiltIn {
 public:
  explicit Lamb(const OptimizerConfig& config) : BuiltIn(config, {"exp_avg", "exp_avg_sq"}) {}

  // |w|^2 and |u|^2.
  [[nodiscard]] int norms_per_tensor() const override { return 2; }

  // Reads gradient, weights and moments: 16 bytes an element in fp32.
  void add_norms(const Slice& slice, const StepInfo& info, std::span<double> norms,
                 std::span<double> partials) const override {
    check(slice, info);
    require_norms(slice, norms);
    const auto tensors = static_cast<std::int64_t>(slice.tensors.size());
    if (std::ssize(partials) < norm_partials(slice.count, tensors)) {
      raise<ArgumentError>(
          {.object = "partial sums of optimizer lamb",
           .expected =
               "at least " + std::to_string(norm_partials(slice.count, tensors)) + " elements",
           .found = std::to_string(partials.size())});
    }
    // A block holds parts of several tensors and a tensor lies in several blocks: the part of
    // tensor s in block b has slot b + s, which no other has, as one of them grows from part to
    // part.
    double* const slots = partials.data();
    const Numbers numbers = numbers_of(info);
    visit_types(slice, [&](auto master, auto gradient_tag) {
      using T = typename decltype(master)::type;
      using Gradient = typename decltype(gradient_tag)::type;
      state::for_blocks(
          "mics::optim::lamb_norms", slice.count, [=](std::int64_t begin, std::int64_t end) {
            const std::int64_t block = begin / state::block_count;
            std::int64_t last = -1;
            for_pieces<T, Gradient, Cut::tensors>(
                slice, begin, end, [&](const Piece<T>& piece, std::int64_t) {
                  double* const slot = slots + 2 * (block + piece.segment);
                  if (piece.segment != last) slot[0] = slot[1] = 0;
                  last = piece.segment;
                  const Formula<T> formula(numbers, piece);
                  std::array<T, chunk_count> u;
                  for (std::int64_t from = 0; from < piece.count; from += chunk_count) {
                    const std::int64_t count = std::min(chunk_count, piece.count - from);
                    const T* const gradient = piece.gradient + from;
                    const T* const weights = piece.weights + from;
                    const T* const exp_avg = piece.states[0] + from;
                    const T* const exp_avg_sq = piece.states[1] + from;
#pragma GCC ivdep
                    for (std::int64_t i = 0; i < count; ++i) {
                      u[static_cast<std::size_t>(i)] =
                          formula(gradient[i], exp_avg[i], exp_avg_sq[i], weights[i]).u;
                    }
                    slot[0] += sum_of_squares(weights, count);
                    slot[1] += sum_of_squares(u.data(), count);
                  }
                });
          });
    });
    for (std::int64_t s = 0; s < tensors; ++s) {
      const state::TensorSegment& segment = slice.tensors[static_cast<std::size_t>(s)];
      double* const sums = norms.data() + 2 * segment.tensor;
      for (std::int64_t b = segment.begin / state::block_count;
           b * state::block_count < segment.end; ++b) {
        sums[0] += slots[2 * (b + s)];
        sums[1] += slots[2 * (b + s) + 1];
      }
    }
  }

  // Reads gradient, weights and moments again and writes all but the gradient.
  void update(const Slice& slice, const StepInfo& info) const override {
    check(slice, info);
    require_norms(slice, slice.norms);
    const std::array<double, 2> correction = bias_corrections(info);
    const double step_size = info.learning_rate * std::sqrt(correction[1]) / correction[0];
    const double highest = config().max_coefficient;
    const double lowest = config().min_coefficient;
    const std::span<const double> norms = slice.norms;
    const std::span<const state::TensorSegment> tensors = slice.tensors;
    const Numbers numbers = numbers_of(info);
    sweep<Cut::tensors>(
        "mics::optim::lamb", slice, config().ema_decay, [=]<class T>(const Piece<T>& piece) {
          const auto tensor =
              static_cast<std::size_t>(tensors[static_cast<std::size_t>(piece.segment)].tensor);
          const double w_norm = std::sqrt(norms[2 * tensor]);
          const double u_norm = std::sqrt(norms[2 * tensor + 1]);
          double ratio = 1;
          if (w_norm != 0 && u_norm != 0) {
            ratio = std::clamp(w_norm / u_norm, lowest, highest);
          }
          const auto rate = static_cast<T>(step_size * piece.learning_rate_factor * ratio);
          const Formula<T> formula(numbers, piece);
          const T* const gradient = piece.gradient;
          T* const weights = piece.weights;
          T* const exp_avg = piece.states[0];
          T* const exp_avg_sq = piece.states[1];
          const std::int64_t count = piece.count;
#pragma GCC ivdep
          for (std::int64_t i = 0; i < count; ++i) {
            const Direction<T> next = formula(gradient[i], exp_avg[i], exp_avg_sq[i], weights[i]);
            exp_avg[i] = next.exp_avg;
            exp_avg_sq[i] = next.exp_avg_sq;
            weights[i] -= rate * next.u;
          }
        });
  }

 private:
  static void require_norms(const Slice& slice, std::span<const double> norms) {
    const std::int64_t wanted = slice.tensors.empty() ? 0 : 2 * (slice.tensors.back().tensor + 1);
    if (std::ssize(norms) >= wanted) return;
    raise<ArgumentError>({.object = "slice of optimizer lamb",
                          .expected = "at least " + std::to_string(wanted) + " sums over tensors",
                          .found = std::to_string(norms.size()),
                          .remedy = "add_norms on every shard, then their sum"});
  }

  [[nodiscard]] Numbers numbers_of(const StepInfo& info) const {
    return {betas(info), config().epsilon, config().weight_decay, info.gradient_scale};
  }
};

}  // namespace

std::unique_ptr<Optimizer> make_lamb(const OptimizerConfig& config) {
  return std::make_unique<Lamb>(config);
}

}  // namespace mics::optim::detail
