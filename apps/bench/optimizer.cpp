// SPDX-License-Identifier: Apache-2.0
#include <mics/base/dtype.hpp>
#include <mics/optim/norm.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/arena.hpp>
#include <mics/state/for_blocks.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/race.hpp>
#include <bench/results.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mics::apps::bench {
namespace {

// Both kernels do little arithmetic a byte: their floor is the memory's speed, of which memcpy, run
// by the same ranks at once, is the measure. It counts the bytes that it reads and those it writes.
constexpr double update_bar = 0.85;

using Host = Kokkos::DefaultHostExecutionSpace;

/// One memcpy a thread, each over its share of the whole range.
void copy_shares(std::byte* to, const std::byte* from, std::int64_t bytes) {
  const auto threads = static_cast<std::int64_t>(Host().concurrency());
  const auto share = [=](std::int64_t thread) {
    const std::int64_t begin = bytes * thread / threads;
    std::memcpy(to + begin, from + begin,
                static_cast<std::size_t>(bytes * (thread + 1) / threads - begin));
  };
  if (threads == 1) {
    share(0);
    return;
  }
  Kokkos::parallel_for("mics::bench::copy", Kokkos::RangePolicy<Host>(0, threads), share);
  Kokkos::fence("mics::bench: the copy is timed to its end");
}

/// The state of one rank, and what memcpy reads and writes: as many bytes, half of them each. All
/// lies in an arena, as the engine's state does.
struct State {
  explicit State(std::int64_t elements)
      : count(elements),
        arena(2 * (4 * state::arena_bytes(count * bytes_of(DType::fp32)) +
                   state::arena_bytes(count * bytes_of(DType::bf16)))),
        gradient(take<float>("gradient", count)),
        master_weights(take<float>("master_weights", count)),
        exp_avg(take<float>("exp_avg", count)),
        exp_avg_sq(take<float>("exp_avg_sq", count)),
        compute(take<bf16>("compute", count)),
        copied_bytes((4 * bytes_of(DType::fp32) + bytes_of(DType::bf16)) * count / 2),
        from(take<std::byte>("from", copied_bytes)),
        to(take<std::byte>("to", copied_bytes)),
        partials(static_cast<std::size_t>(state::blocks_of(count))) {
    const auto fill = [g = gradient, w = master_weights](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        g[i] = static_cast<float>(i % 7 - 3);
        w[i] = static_cast<float>(i % 11 - 5);
      }
    };
    state::for_blocks("mics::bench::fill", count, fill);
    // As a model has them: weights that decay and biases that do not.
    constexpr std::int64_t run = std::int64_t{1} << 20;
    for (std::int64_t begin = 0; begin < count; begin += run) {
      runs.push_back({.begin = begin,
                      .end = std::min(count, begin + run),
                      .weight_decay_factor = begin / run % 2 == 0 ? 1.0 : 0.0});
    }
  }

  template <class T>
  T* take(std::string_view what, std::int64_t elements) {
    return reinterpret_cast<T*>(arena.take(elements * static_cast<std::int64_t>(sizeof(T)), what));
  }

  std::int64_t count;
  state::Arena arena;
  float* gradient;
  float* master_weights;
  float* exp_avg;
  float* exp_avg_sq;
  bf16* compute;
  std::int64_t copied_bytes;
  std::byte* from;
  std::byte* to;
  std::vector<double> partials;
  std::vector<state::HyperRun> runs;
};

void race_size(const Session& session, const Options& options, std::int64_t bytes,
               Results& results) {
  constexpr std::int64_t state_bytes = 4 * sizeof(float) + sizeof(bf16);  // of one element
  const std::int64_t count = std::max<std::int64_t>(1, bytes / state_bytes);
  State state(count);
  const auto adamw = optim::make_optimizer({.kind = OptimizerKind::adamw, .weight_decay = 0.1});
  const optim::StepInfo step{.step = 100, .learning_rate = 1e-3};
  const std::array<void*, 2> states{state.exp_avg, state.exp_avg_sq};
  const optim::Slice slice{.gradient = state.gradient,
                           .master_weights = state.master_weights,
                           .states = states,
                           .compute_dtype = DType::bf16,
                           .count = count,
                           .runs = state.runs};
  optim::Slice with_copy = slice;
  with_copy.compute = state.compute;

  double norm = 0;
  const std::vector<Runner> runners{
      {.name = "memcpy", .run = [&] { copy_shares(state.to, state.from, state.copied_bytes); }},
      {.name = "AdamW fp32 + bf16 copy", .run = [&] { adamw->update(with_copy, step); }},
      {.name = "AdamW fp32", .run = [&] { adamw->update(slice, step); }},
      {.name = "norm fp32", .run = [&] {
         norm = optim::sum_of_squares(state.gradient, DType::fp32, count, state.partials);
       }}};
  const Times times = race(session.world(), runners, options.pairs);

  // Bytes read and written: memcpy both of its arrays; AdamW reads gradient, weights and moments
  // and writes all but the gradient, and the copy.
  const std::vector<std::int64_t> moved{2 * state.copied_bytes, 30 * count, 28 * count, 4 * count};
  for (std::size_t i = 0; i < runners.size(); ++i) {
    // Speed over memcpy's speed, round by round.
    Ratio speed = ratio(times[0], times[i]);
    const double bytes_ratio = static_cast<double>(moved[i]) / static_cast<double>(moved[0]);
    speed.median *= bytes_ratio;
    speed.low *= bytes_ratio;
    speed.high *= bytes_ratio;
    const double seconds = median(times[i]);
    const double rate = static_cast<double>(moved[i]) / seconds * 1e-9;
    const bool judged = i == 1 || i == 2;
    const std::string verdict = judged ? results.judge(speed.median >= update_bar, update_bar) : "";
    results.line(padded_left(runners[i].name, 24) + padded(bytes_text(moved[i]), 11) +
                 padded(time_text(seconds), 10) + number_text(rate, 2, 9) +
                 number_text(speed.median, 2, 8) + " (" + number_text(speed.low, 2) + "-" +
                 number_text(speed.high, 2) + ")  " + verdict);
    nlohmann::json record{{"kernel", runners[i].name},
                          {"elements", count},
                          {"bytes", moved[i]},
                          {"seconds", seconds},
                          {"gigabytes_per_second", rate},
                          {"ratio", speed.median},
                          {"ratio_first_quartile", speed.low},
                          {"ratio_third_quartile", speed.high},
                          {"pairs", times[i].size()}};
    if (judged) record["bar"] = update_bar;
    results.record(std::move(record));
  }
}

}  // namespace

int run_optimizer(const Session& session, const Options& options) {
  Results results(session, "optimizer", options.json);
  results.line("Kernels of a step beside memcpy by the same ranks at once, " +
               std::to_string(session.size()) + " rank(s) of " +
               std::to_string(Host().concurrency()) + " thread(s), median of " +
               std::to_string(options.pairs) + " rounds in turn.");
  results.line("GB/s: bytes read and written a rank; ratio: over memcpy's, with quartiles.");
  results.line("                              bytes      time     GB/s   ratio (quartiles)");
  for (const std::uint64_t size : options.sizes) {
    race_size(session, options, static_cast<std::int64_t>(size), results);
  }
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
