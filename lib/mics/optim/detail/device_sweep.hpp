// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/device.hpp>
#include <mics/base/dtype.hpp>
#include <mics/optim/detail/lanes.hpp>
#include <mics/optim/detail/packs.hpp>
#include <mics/optim/detail/rules.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/for_blocks.hpp>

#include <Kokkos_Core.hpp>

#include <cstdint>
#include <optional>

// The kernels of the optimizers on a device. Dtypes are run-time values of a kernel, the same for
// all its threads, as a kernel for each combination would be hundreds.

namespace mics::optim::detail {

/// Above this size of a functor Kokkos launches through constant memory, which waits for the
/// kernels that use it.
inline constexpr std::size_t most_functor_bytes = 512;

/// Elements that one thread updates.
inline constexpr int update_width = 4;

/// The first range of a table, sorted by its ends, that ends behind `position`.
template <class Range>
KOKKOS_INLINE_FUNCTION std::int64_t first_behind(const Range* table, std::int64_t size,
                                                 std::int64_t position) {
  std::int64_t low = 0;
  std::int64_t high = size;
  while (low < high) {
    const std::int64_t middle = low + (high - low) / 2;
    if (table[middle].end <= position) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

/// Where the hyper-parameters of a slice lie, device memory.
struct FactorTables {
  const state::HyperRun* runs = nullptr;
  std::int64_t run_count = 0;
  const state::TensorSegment* tensors = nullptr;
  std::int64_t tensor_count = 0;
  const double* norms = nullptr;
};

/// The factors of the element at `position`, and the end of the elements behind it that share them.
/// False for an element of no tensor, where the rule reads norms.
template <bool reads_norms>
KOKKOS_INLINE_FUNCTION bool find_factors(const FactorTables& tables, std::int64_t position,
                                         Factors& factors, std::int64_t& end) {
  const state::HyperRun& run =
      tables
          .runs[tables.run_count == 1 ? 0 : first_behind(tables.runs, tables.run_count, position)];
  factors.learning_rate = run.learning_rate_factor;
  factors.weight_decay = run.weight_decay_factor;
  end = run.end;
  if constexpr (reads_norms) {
    const std::int64_t at = first_behind(tables.tensors, tables.tensor_count, position);
    if (at == tables.tensor_count) return false;
    const state::TensorSegment& tensor = tables.tensors[at];
    if (tensor.begin > position) {
      if (tensor.begin < end) end = tensor.begin;
      return false;
    }
    if (tensor.end < end) end = tensor.end;
    factors.weight_norm = Kokkos::sqrt(tables.norms[2 * tensor.tensor]);
    factors.update_norm = Kokkos::sqrt(tables.norms[2 * tensor.tensor + 1]);
  }
  return true;
}

/// One pass over a slice: a thread updates update_width neighbouring elements.
template <class Rule>
struct UpdateKernel {
  using T = typename Rule::Value;

  const void* gradient;
  T* weights;
  T* states[2];
  T* ema;         // null: none
  void* compute;  // null: none
  std::int64_t count;
  FactorTables tables;
  const DeviceStepInfo* info;
  RuleSettings settings;
  T keep;
  T take;
  DType gradient_dtype;
  DType compute_dtype;
  bool packed;  // all arrays can be moved in packs

  KOKKOS_FUNCTION void operator()(std::int64_t group) const {
    if (info->update == 0) return;
    const std::int64_t begin = group * update_width;
    const std::int64_t last = begin + update_width < count ? begin + update_width : count;
    Factors factors;
    std::int64_t end = 0;
    const bool present = find_factors<Rule::reads_norms>(tables, begin, factors, end);
    if (present && packed && begin + update_width <= end) {
      update<update_width>(begin, factors);
      return;
    }
    // The end of the slice, or of elements with the same factors.
    for (std::int64_t i = begin; i < last; ++i) {
      Factors own;
      if (find_factors<Rule::reads_norms>(tables, i, own, end)) update<1>(i, own);
    }
  }

 private:
  template <int width>
  KOKKOS_INLINE_FUNCTION void update(std::int64_t begin, const Factors& factors) const {
    // The gradient comes last: its conversion waits, and all loads are then under way.
    T w[width];
    T a[width];
    T b[width];
    T average[width] = {};
    T g[width];
    load_pack<T>(weights, begin, w);
    if constexpr (Rule::states > 0) load_pack<T>(states[0], begin, a);
    if constexpr (Rule::states > 1) load_pack<T>(states[1], begin, b);
    if (ema != nullptr) load_pack<T>(ema, begin, average);
    load_pack(gradient_dtype, gradient, begin, g);

    const Rule rule(settings, *info, factors);
    for (int k = 0; k < width; ++k) {
      if constexpr (Rule::states == 0) {
        rule(g[k], w[k]);
      } else if constexpr (Rule::states == 1) {
        rule(g[k], w[k], a[k]);
      } else {
        rule(g[k], w[k], a[k], b[k]);
      }
    }

    store_pack<T>(weights, begin, w);
    if constexpr (Rule::states > 0) store_pack<T>(states[0], begin, a);
    if constexpr (Rule::states > 1) store_pack<T>(states[1], begin, b);
    if (ema != nullptr) {
      for (int k = 0; k < width; ++k) average[k] = keep * average[k] + take * w[k];
      store_pack<T>(ema, begin, average);
    }
    if (compute != nullptr) store_pack(compute_dtype, compute, begin, w);
  }
};

[[nodiscard]] inline FactorTables tables_of(const Slice& slice) {
  return {.runs = slice.runs.data(),
          .run_count = std::ssize(slice.runs),
          .tensors = slice.tensors.data(),
          .tensor_count = std::ssize(slice.tensors),
          .norms = slice.norms.data()};
}

template <class Rule>
void enqueue_update_of(const char* label, const Execution& exec, const Slice& slice,
                       std::optional<double> ema_decay, const RuleSettings& settings,
                       const DeviceStepInfo* info) {
  using T = typename Rule::Value;
  static_assert(sizeof(UpdateKernel<Rule>) <= most_functor_bytes);
  UpdateKernel<Rule> kernel{.gradient = slice.gradient,
                            .weights = static_cast<T*>(slice.master_weights),
                            .states = {nullptr, nullptr},
                            .ema = nullptr,
                            .compute = slice.compute,
                            .count = slice.count,
                            .tables = tables_of(slice),
                            .info = info,
                            .settings = settings,
                            .keep = static_cast<T>(ema_decay.value_or(1)),
                            .take = static_cast<T>(1 - ema_decay.value_or(1)),
                            .gradient_dtype = slice.gradient_dtype,
                            .compute_dtype = slice.compute_dtype,
                            .packed = true};
  const auto note = [&](const void* data, DType dtype) {
    kernel.packed = kernel.packed && fits_packs(data, dtype, update_width);
  };
  note(slice.gradient, slice.gradient_dtype);
  note(slice.master_weights, slice.master_dtype);
  note(slice.compute, slice.compute_dtype);
  for (void* const state : slice.states) note(state, slice.master_dtype);
  if constexpr (Rule::states > 0) {
    for (std::size_t s = 0; s < Rule::states; ++s) {
      kernel.states[s] = static_cast<T*>(slice.states[s]);
    }
  }
  if (ema_decay) kernel.ema = static_cast<T*>(slice.states[slice.states.size() - 1]);
  using Policy = Kokkos::RangePolicy<device::Space, Kokkos::IndexType<std::int64_t>>;
  Kokkos::parallel_for(
      label, Policy(exec.as<device::Space>(), 0, (slice.count + update_width - 1) / update_width),
      kernel);
}

/// As sweep() with a rule, for a slice in device memory; does not block.
template <template <class> class Rule>
void enqueue_sweep(const char* label, const Execution& exec, const Slice& slice,
                   std::optional<double> ema_decay, const RuleSettings& settings,
                   const DeviceStepInfo* info) {
  if (slice.count == 0) return;
  visit_arithmetic(slice.master_dtype, [&](auto master) {
    using T = typename decltype(master)::type;
    enqueue_update_of<Rule<T>>(label, exec, slice, ema_decay, settings, info);
  });
}

/// Squares of the weights and of the directions of one block: those of each tensor's part in a slot
/// of its own. A team takes a block.
template <class Rule>
struct NormKernel {
  using T = typename Rule::Value;

  const void* gradient;
  const T* weights;
  const T* states[2];
  std::int64_t count;
  FactorTables tables;
  const DeviceStepInfo* info;
  RuleSettings settings;
  DType gradient_dtype;
  double* partials;

  KOKKOS_FUNCTION void operator()(const Member& team) const {
    if (info->update == 0) return;
    double* const lanes = team_lanes(team, 2);
    const std::int64_t block = team.league_rank();
    const std::int64_t begin = block * state::block_count;
    const std::int64_t limit = begin + state::block_count;
    const std::int64_t end = limit < count ? limit : count;
    for (std::int64_t s = first_behind(tables.tensors, tables.tensor_count, begin);
         s < tables.tensor_count && tables.tensors[s].begin < end; ++s) {
      const state::TensorSegment& tensor = tables.tensors[s];
      const std::int64_t first = tensor.begin > begin ? tensor.begin : begin;
      const std::int64_t last = tensor.end < end ? tensor.end : end;
      for (int lane = team.team_rank(); lane < sum_lanes; lane += team.team_size()) {
        add_lane(first, last, lane, lanes[lane], lanes[sum_lanes + lane]);
      }
      fold_lanes(team, lanes, 2);
      if (team.team_rank() == 0) {
        // No other part has this slot, as block or tensor grows from one part to the next.
        partials[2 * (block + s)] = lanes[0];
        partials[2 * (block + s) + 1] = lanes[sum_lanes];
      }
      team.team_barrier();
    }
  }

 private:
  KOKKOS_INLINE_FUNCTION void add_lane(std::int64_t first, std::int64_t last, int lane,
                                       double& weight_squares, double& update_squares) const {
    double of_weights = 0;
    double of_updates = 0;
    std::int64_t run_end = 0;
    Factors factors;
    for (std::int64_t i = first + lane; i < last; i += sum_lanes) {
      if (i >= run_end) find_factors<false>(tables, i, factors, run_end);
      const Rule rule(settings, *info, factors);
      T g[1];
      load_pack(gradient_dtype, gradient, i, g);
      T m = states[0][i];
      T v = states[1][i];
      const T w = weights[i];
      const auto u = static_cast<double>(rule.direction(g[0], w, m, v));
      of_weights += static_cast<double>(w) * static_cast<double>(w);
      of_updates += u * u;
    }
    weight_squares = of_weights;
    update_squares = of_updates;
  }
};

/// Adds the blocks of each tensor to its sums. A team takes a tensor.
struct FoldNormsKernel {
  FactorTables tables;
  const DeviceStepInfo* info;
  const double* partials;
  double* norms;

  KOKKOS_FUNCTION void operator()(const Member& team) const {
    if (info->update == 0) return;
    double* const lanes = team_lanes(team, 2);
    const std::int64_t s = team.league_rank();
    const state::TensorSegment& tensor = tables.tensors[s];
    const std::int64_t first = tensor.begin / state::block_count;
    const std::int64_t end = (tensor.end + state::block_count - 1) / state::block_count;
    for (int lane = team.team_rank(); lane < sum_lanes; lane += team.team_size()) {
      double of_weights = 0;
      double of_updates = 0;
      for (std::int64_t b = first + lane; b < end; b += sum_lanes) {
        of_weights += partials[2 * (b + s)];
        of_updates += partials[2 * (b + s) + 1];
      }
      lanes[lane] = of_weights;
      lanes[sum_lanes + lane] = of_updates;
    }
    fold_lanes(team, lanes, 2);
    if (team.team_rank() == 0) {
      norms[2 * tensor.tensor] += lanes[0];
      norms[2 * tensor.tensor + 1] += lanes[sum_lanes];
    }
  }
};

/// |w|^2 and |u|^2 of this slice's part of each tensor, added to `norms`.
template <template <class> class Rule>
void enqueue_tensor_norms(const char* label, const Execution& exec, const Slice& slice,
                          const RuleSettings& settings, const DeviceStepInfo* info, double* norms,
                          double* partials) {
  const std::int64_t tensors = std::ssize(slice.tensors);
  if (slice.count == 0 || tensors == 0) return;
  const FactorTables tables = tables_of(slice);
  visit_arithmetic(slice.master_dtype, [&](auto master) {
    using T = typename decltype(master)::type;
    static_assert(sizeof(NormKernel<Rule<T>>) <= most_functor_bytes);
    Kokkos::parallel_for(label, team_policy(exec, state::blocks_of(slice.count), 2),
                         NormKernel<Rule<T>>{.gradient = slice.gradient,
                                             .weights = static_cast<const T*>(slice.master_weights),
                                             .states = {static_cast<const T*>(slice.states[0]),
                                                        static_cast<const T*>(slice.states[1])},
                                             .count = slice.count,
                                             .tables = tables,
                                             .info = info,
                                             .settings = settings,
                                             .gradient_dtype = slice.gradient_dtype,
                                             .partials = partials});
  });
  Kokkos::parallel_for(label, team_policy(exec, tensors, 2),
                       FoldNormsKernel{tables, info, partials, norms});
}

}  // namespace mics::optim::detail
