// SPDX-License-Identifier: Apache-2.0
#include <mics/optim/update.hpp>
#include <mics/state/for_blocks.hpp>

#include <algorithm>
#include <cmath>
#include <type_traits>

namespace mics::optim {
namespace {

// Calls `body(begin, end, run)` for the parts of [begin, end) with equal hyper-parameters.
template <class Body>
void for_runs(std::span<const state::HyperRun> runs, std::int64_t begin, std::int64_t end,
              const Body& body) {
  auto run = std::partition_point(runs.begin(), runs.end(),
                                  [=](const state::HyperRun& r) { return r.end <= begin; });
  for (; run != runs.end() && run->begin < end; ++run) {
    body(std::max(begin, run->begin), std::min(end, run->end), *run);
  }
}

// Calls `body(gradient, master, compute)` with typed pointers; compute is null for the master
// itself.
template <class Body>
void visit_types(const Slice& slice, const Body& body) {
  visit_arithmetic(slice.master_dtype, [&](auto master_tag) {
    using Master = typename decltype(master_tag)::type;
    visit_arithmetic(slice.gradient_dtype, [&](auto gradient_tag) {
      using Gradient = typename decltype(gradient_tag)::type;
      visit(slice.compute_dtype, [&](auto compute_tag) {
        using Compute = typename decltype(compute_tag)::type;
        body(static_cast<const Gradient*>(slice.gradient),
             static_cast<Master*>(slice.master_weights), static_cast<Compute*>(slice.compute));
      });
    });
  });
}

// Rounding is integer arithmetic, the same bits on every CPU, and too slow on the oldest ones.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__)
#define MICS_FOR_EACH_X86_64 \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MICS_FOR_EACH_X86_64
#endif
MICS_FOR_EACH_X86_64 void round_all(const float* wide, bf16* narrow, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) narrow[i] = bf16(wide[i]);
}
#undef MICS_FOR_EACH_X86_64

// Rounds updated weights to the compute dtype while they are in first-level cache.
template <class Master, class Compute>
void write_compute(const Master* master, Compute* compute, std::int64_t begin, std::int64_t end) {
  if (compute == nullptr) return;
  if constexpr (std::is_same_v<Master, float> && std::is_same_v<Compute, bf16>) {
    round_all(master + begin, compute + begin, end - begin);
    return;
  }
  for (std::int64_t i = begin; i < end; ++i) compute[i] = static_cast<Compute>(master[i]);
}

}  // namespace

void update(const AdamW& adamw, const Slice& slice) {
  visit_types(slice, [&](const auto* gradient, auto* master, auto* compute) {
    using Master = std::remove_pointer_t<decltype(master)>;
    auto* const exp_avg = static_cast<Master*>(slice.exp_avg);
    auto* const exp_avg_sq = static_cast<Master*>(slice.exp_avg_sq);
    const auto runs = slice.runs;
    const auto beta1 = static_cast<Master>(adamw.beta1);
    const auto beta2 = static_cast<Master>(adamw.beta2);
    const auto one_minus_beta1 = static_cast<Master>(1 - adamw.beta1);
    const auto one_minus_beta2 = static_cast<Master>(1 - adamw.beta2);
    const auto scale = static_cast<Master>(adamw.gradient_scale);
    const auto epsilon = static_cast<Master>(adamw.epsilon);
    const auto root_correction2 = static_cast<Master>(1 / std::sqrt(adamw.bias_correction2));
    const AdamW hyper = adamw;
    state::for_blocks("mics::optim::adamw", slice.count, [=](std::int64_t b, std::int64_t e) {
      for_runs(runs, b, e, [=](std::int64_t begin, std::int64_t end, const state::HyperRun& run) {
        const double rate = hyper.learning_rate * run.learning_rate_factor;
        const auto step_size = static_cast<Master>(rate / hyper.bias_correction1);
        const auto keep =
            static_cast<Master>(1 - rate * hyper.weight_decay * run.weight_decay_factor);
#pragma GCC ivdep
        for (std::int64_t i = begin; i < end; ++i) {
          const Master g = static_cast<Master>(gradient[i]) * scale;
          const Master m = beta1 * exp_avg[i] + one_minus_beta1 * g;
          const Master v = beta2 * exp_avg_sq[i] + one_minus_beta2 * g * g;
          const Master denominator = std::sqrt(v) * root_correction2 + epsilon;
          exp_avg[i] = m;
          exp_avg_sq[i] = v;
          master[i] = master[i] * keep - step_size * (m / denominator);
        }
        write_compute(master, compute, begin, end);
      });
    });
  });
}

void update(const Sgd& sgd, const Slice& slice) {
  visit_types(slice, [&](const auto* gradient, auto* master, auto* compute) {
    using Master = std::remove_pointer_t<decltype(master)>;
    const auto runs = slice.runs;
    const auto scale = static_cast<Master>(sgd.gradient_scale);
    const Sgd hyper = sgd;
    state::for_blocks("mics::optim::sgd", slice.count, [=](std::int64_t b, std::int64_t e) {
      for_runs(runs, b, e, [=](std::int64_t begin, std::int64_t end, const state::HyperRun& run) {
        const auto rate = static_cast<Master>(hyper.learning_rate * run.learning_rate_factor);
        const auto decay = static_cast<Master>(hyper.weight_decay * run.weight_decay_factor);
#pragma GCC ivdep
        for (std::int64_t i = begin; i < end; ++i) {
          const Master g = static_cast<Master>(gradient[i]) * scale;
          master[i] -= rate * (g + decay * master[i]);
        }
        write_compute(master, compute, begin, end);
      });
    });
  });
}

}  // namespace mics::optim
