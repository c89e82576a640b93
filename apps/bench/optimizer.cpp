// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/base/dtype.hpp>
#include <mics/base/execution.hpp>
#include <mics/optim/device_step.hpp>
#include <mics/optim/norm.hpp>
#include <mics/optim/optimizer.hpp>
#include <mics/state/arena.hpp>
#include <mics/state/for_blocks.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/race.hpp>
#include <bench/results.hpp>
#include <bench/stream_timer.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace mics::apps::bench {
namespace {

// The kernels do little arithmetic a byte: their floor is the memory's speed, of which a copy by
// the same ranks is the measure. It counts the bytes that it reads and those it writes.
constexpr double host_bar = 0.85;
constexpr double device_bar = 0.95;
// Without a device its path is run to be tested; the loops of the host are the fast ones there.
constexpr std::optional<double> no_bar = {};

using Host = Kokkos::DefaultHostExecutionSpace;

// Zeros are left out, as a training run has few: roots of them take longer.
struct FillKernel {
  float* gradient;
  bf16* narrow_gradient;
  float* weights;
  KOKKOS_FUNCTION void operator()(std::int64_t i) const {
    gradient[i] = static_cast<float>(i % 8) - 3.5F;
    narrow_gradient[i] = bf16(gradient[i]);
    weights[i] = static_cast<float>(i % 11 - 5);
  }
};

// The state of one rank, and what a copy reads and writes: as many bytes as AdamW with a copy does.
// All lies in an arena, as the engine's state does.
struct State {
  State(std::int64_t elements, Memory memory)
      : count(elements),
        copied_bytes((7 * bytes_of(DType::fp32) + bytes_of(DType::bf16)) * count / 2),
        step_bytes(optim::DeviceStep::bytes(1, 1, 1)),
        arena(4 * state::arena_bytes(count * bytes_of(DType::fp32)) +
                  2 * state::arena_bytes(count * bytes_of(DType::bf16)) +
                  2 * state::arena_bytes(copied_bytes) + state::arena_bytes(step_bytes),
              memory),
        gradient(take<float>("gradient", count)),
        narrow_gradient(take<bf16>("narrow_gradient", count)),
        master_weights(take<float>("master_weights", count)),
        moments{take<float>("exp_avg", count), take<float>("exp_avg_sq", count)},
        compute(take<bf16>("compute", count)),
        from(take<std::byte>("from", copied_bytes)),
        to(take<std::byte>("to", copied_bytes)),
        step_memory(take<std::byte>("step", step_bytes)) {
    const FillKernel fill{gradient, narrow_gradient, master_weights};
    if (memory == Memory::device) {
      using Policy = Kokkos::RangePolicy<device::Space, Kokkos::IndexType<std::int64_t>>;
      Kokkos::parallel_for("mics::bench::fill", Policy(0, count), fill);
      Kokkos::fence("mics::bench: the state is filled");
    } else {
      state::for_blocks("mics::bench::fill", count, [fill](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) fill(i);
      });
    }
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

  // What AdamW updates without a compute copy. Valid while this lives.
  [[nodiscard]] optim::Slice slice(std::span<const state::HyperRun> runs_of_slice) const {
    return {.gradient = gradient,
            .master_weights = master_weights,
            .states = moments,
            .compute_dtype = DType::bf16,
            .count = count,
            .runs = runs_of_slice};
  }

  std::int64_t count;
  std::int64_t copied_bytes;
  std::int64_t step_bytes;
  state::Arena arena;
  float* gradient;
  bf16* narrow_gradient;
  float* master_weights;
  std::array<void*, 2> moments;  // exp_avg, exp_avg_sq
  bf16* compute;
  std::byte* from;
  std::byte* to;
  std::byte* step_memory;
  std::vector<state::HyperRun> runs;
};

// One of the rows: what is timed, and the bytes that it reads and writes.
struct Kernel {
  std::string name;
  std::int64_t moved;
  std::optional<double> bar;
  std::function<void()> run;
};

constexpr optim::StepInfo step{.step = 100, .learning_rate = 1e-3};
constexpr std::array<double, 2> betas{0.9, 0.999};

std::unique_ptr<optim::Optimizer> make_adamw() {
  return optim::make_optimizer({.kind = OptimizerKind::adamw, .betas = betas, .weight_decay = 0.1});
}

// Bytes read and written: the copy both of its arrays; AdamW reads gradient, weights and moments
// and writes all but the gradient, and the compute copy.
constexpr std::int64_t with_copy_bytes = 30;
constexpr std::int64_t narrow_gradient_bytes = 28;
constexpr std::int64_t without_copy_bytes = 28;

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

void report(const Options& options, std::int64_t count, std::span<const Kernel> kernels,
            const Times& times, Results& results) {
  for (std::size_t i = 0; i < kernels.size(); ++i) {
    const Kernel& kernel = kernels[i];
    // Speed over the copy's speed, round by round.
    Ratio speed = ratio(times[0], times[i]);
    const double bytes_ratio =
        static_cast<double>(kernel.moved) / static_cast<double>(kernels[0].moved);
    speed.median *= bytes_ratio;
    speed.low *= bytes_ratio;
    speed.high *= bytes_ratio;
    const double seconds = median(times[i]);
    const double rate = static_cast<double>(kernel.moved) / seconds * 1e-9;
    const std::string verdict =
        kernel.bar ? results.judge(speed.median >= *kernel.bar, *kernel.bar) : "";
    results.line(padded_left(kernel.name, 34) + padded(bytes_text(kernel.moved), 11) +
                 padded(time_text(seconds), 10) + number_text(rate, 2, 9) +
                 number_text(speed.median, 3, 8) + " (" + number_text(speed.low, 3) + "-" +
                 number_text(speed.high, 3) + ")  " + verdict);
    nlohmann::json record{{"kernel", kernel.name},
                          {"memory", options.memory},
                          {"elements", count},
                          {"bytes", kernel.moved},
                          {"seconds", seconds},
                          {"gigabytes_per_second", rate},
                          {"ratio", speed.median},
                          {"ratio_first_quartile", speed.low},
                          {"ratio_third_quartile", speed.high},
                          {"pairs", times[i].size()}};
    if (kernel.bar) record["bar"] = *kernel.bar;
    results.record(std::move(record));
  }
}

void race_on_host(const Session& session, const Options& options, std::int64_t count,
                  Results& results) {
  State state(count, Memory::host);
  std::vector<double> partials(static_cast<std::size_t>(state::blocks_of(count)));
  const auto adamw = make_adamw();
  const optim::Slice slice = state.slice(state.runs);
  optim::Slice with_copy = slice;
  with_copy.compute = state.compute;
  double norm = 0;
  const std::vector<Kernel> kernels{
      {"memcpy", 2 * state.copied_bytes, no_bar,
       [&] { copy_shares(state.to, state.from, state.copied_bytes); }},
      {"AdamW fp32 + bf16 copy", with_copy_bytes * count, host_bar,
       [&] { adamw->update(with_copy, step); }},
      {"AdamW fp32", without_copy_bytes * count, host_bar, [&] { adamw->update(slice, step); }},
      {"norm fp32", bytes_of(DType::fp32) * count, no_bar,
       [&] { norm = optim::sum_of_squares(state.gradient, DType::fp32, count, partials); }}};
  std::vector<Runner> runners;
  for (const Kernel& kernel : kernels) runners.push_back({.name = kernel.name, .run = kernel.run});
  report(options, count, kernels, race(session.world(), runners, options.pairs), results);
}

void race_on_device(const Session& session, const Options& options, std::int64_t count,
                    Results& results) {
  State state(count, Memory::device);
  const Execution exec;
  // What the kernels read of a step that the device has decided, and the table of factors.
  optim::DeviceStepInfo decided{.learning_rate = step.learning_rate,
                                .beta1 = betas[0],
                                .beta2 = betas[1],
                                .correction1 = 1 - std::pow(betas[0], step.step),
                                .correction2 = 1 - std::pow(betas[1], step.step),
                                .gradient_scale = step.gradient_scale,
                                .step = step.step,
                                .update = 1};
  const Kokkos::View<optim::DeviceStepInfo*, device::MemorySpace> info("mics::bench::info", 1);
  const Kokkos::View<state::HyperRun*, device::MemorySpace> runs("mics::bench::runs",
                                                                 state.runs.size());
  device::copy(exec, info.data(), &decided, sizeof(decided));
  device::copy(exec, runs.data(), state.runs.data(),
               static_cast<std::int64_t>(state.runs.size() * sizeof(state::HyperRun)));
  exec.fence("mics::bench: what the kernels read is there");
  const auto adamw = make_adamw();
  const optim::Slice slice = state.slice({runs.data(), runs.size()});
  optim::Slice with_copy = slice;
  with_copy.compute = state.compute;
  optim::Slice narrow = with_copy;
  narrow.gradient = state.narrow_gradient;
  narrow.gradient_dtype = DType::bf16;
  optim::DeviceStep norm({state.step_memory, static_cast<std::size_t>(state.step_bytes)}, exec,
                         {.factors = {1.0}});
  const std::optional<double> bar = device::separate ? std::optional(device_bar) : no_bar;
  const std::vector<Kernel> kernels{
      {"copy", 2 * state.copied_bytes, no_bar,
       [&] { device::copy(exec, state.to, state.from, state.copied_bytes); }},
      {"AdamW fp32 + bf16 copy", with_copy_bytes * count, bar,
       [&] { adamw->enqueue_update(exec, with_copy, info.data()); }},
      {"AdamW bf16 gradient + bf16 copy", narrow_gradient_bytes * count, bar,
       [&] { adamw->enqueue_update(exec, narrow, info.data()); }},
      {"AdamW fp32", without_copy_bytes * count, bar,
       [&] { adamw->enqueue_update(exec, slice, info.data()); }},
      {"norm fp32", bytes_of(DType::fp32) * count, no_bar,
       [&] { norm.add_squares(0, state.gradient, DType::fp32, count); }},
      {"norm bf16", bytes_of(DType::bf16) * count, no_bar,
       [&] { norm.add_squares(0, state.narrow_gradient, DType::bf16, count); }}};
  StreamTimer timer(exec);
  // Back to back, so that the start of the first one, which waits for the host, does not count.
  constexpr int calls = 4;
  std::vector<Runner> runners;
  for (const Kernel& kernel : kernels) {
    runners.push_back({.name = kernel.name,
                       .run =
                           [&] {
                             timer.start();
                             for (int i = 0; i < calls; ++i) kernel.run();
                             timer.stop();
                           },
                       .calls = calls,
                       .seconds = [&] { return timer.seconds(); }});
  }
  report(options, count, kernels, race(session.world(), runners, options.pairs), results);
}

std::string introduction(const Session& session, const Options& options, Memory memory) {
  const std::string ranks = std::to_string(session.size()) + " rank(s)";
  const std::string rounds = "median of " + std::to_string(options.pairs) + " rounds in turn.";
  if (memory == Memory::host) {
    return "Kernels of a step beside memcpy by the same ranks at once, " + ranks + " of " +
           std::to_string(Host().concurrency()) + " thread(s), " + rounds;
  }
  return "Kernels of a step beside copies, in the memory of " + std::string(device::Space::name()) +
         ", " + ranks + ", timed by events, " + rounds;
}

}  // namespace

int run_optimizer(const Session& session, const Options& options) {
  Results results(session, "optimizer", options.json);
  const Memory memory = options.memory == name(Memory::device) ? Memory::device : Memory::host;
  results.line(introduction(session, options, memory));
  results.line("GB/s: bytes read and written a rank; ratio: over the copy's, with quartiles.");
  results.line(
      "                                        bytes      time     GB/s   ratio (quartiles)");
  for (const std::uint64_t size : options.sizes) {
    constexpr std::int64_t state_bytes = 4 * sizeof(float) + sizeof(bf16);  // of one element
    const std::int64_t count =
        std::max<std::int64_t>(1, static_cast<std::int64_t>(size) / state_bytes);
    (memory == Memory::device ? race_on_device : race_on_host)(session, options, count, results);
  }
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
