// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/optim/detail/built_in.hpp>
#include <mics/optim/detail/device_sweep.hpp>
#include <mics/optim/detail/sum_of_squares.hpp>
#include <mics/optim/detail/sweep.hpp>

#include <cmath>

namespace mics::optim::detail {
namespace {

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
    const RuleSettings numbers = settings();
    const DeviceStepInfo step = step_of(info);
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
                  const LambRule<T> rule(numbers, step,
                                         {.weight_decay = piece.weight_decay_factor});
                  std::array<T, chunk_count> u;
                  for (std::int64_t from = 0; from < piece.count; from += chunk_count) {
                    const std::int64_t count = std::min(chunk_count, piece.count - from);
                    const T* const gradient = piece.gradient + from;
                    const T* const weights = piece.weights + from;
                    const T* const exp_avg = piece.states[0] + from;
                    const T* const exp_avg_sq = piece.states[1] + from;
#pragma GCC ivdep
                    for (std::int64_t i = 0; i < count; ++i) {
                      T m = exp_avg[i];
                      T v = exp_avg_sq[i];
                      u[static_cast<std::size_t>(i)] =
                          rule.direction(gradient[i], weights[i], m, v);
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
    const std::span<const double> norms = slice.norms;
    const std::span<const state::TensorSegment> tensors = slice.tensors;
    const RuleSettings numbers = settings();
    const DeviceStepInfo step = step_of(info);
    sweep<Cut::tensors>(
        "mics::optim::lamb", slice, config().ema_decay, [=]<class T>(const Piece<T>& piece) {
          const auto tensor =
              static_cast<std::size_t>(tensors[static_cast<std::size_t>(piece.segment)].tensor);
          apply(LambRule<T>(numbers, step,
                            {.learning_rate = piece.learning_rate_factor,
                             .weight_decay = piece.weight_decay_factor,
                             .weight_norm = std::sqrt(norms[2 * tensor]),
                             .update_norm = std::sqrt(norms[2 * tensor + 1])}),
                piece);
        });
  }

  void enqueue_norms(const Execution& exec, const Slice& slice, const DeviceStepInfo* info,
                     double* norms, double* partials) const override {
    check(slice);
    enqueue_tensor_norms<LambRule>("mics::optim::lamb_norms", exec, slice, settings(), info, norms,
                                   partials);
  }

  void enqueue_update(const Execution& exec, const Slice& slice,
                      const DeviceStepInfo* info) const override {
    check(slice);
    enqueue_sweep<LambRule>("mics::optim::lamb", exec, slice, config().ema_decay, settings(), info);
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
};

}  // namespace

std::unique_ptr<Optimizer> make_lamb(const OptimizerConfig& config) {
  return std::make_unique<Lamb>(config);
}

}  // namespace mics::optim::detail
