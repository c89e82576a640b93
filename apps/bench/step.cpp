// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/race.hpp>
#include <bench/raw_device.hpp>
#include <bench/results.hpp>
#include <bench/step_model.hpp>

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

// What a device's collectives and a step without computation cost, beside the same bytes through
// the bare library and a copy of device memory.

namespace mics::apps::bench {
namespace {

constexpr double collective_bar = 0.95;  // of the bare library's speed
constexpr double step_bar = 1.25;        // of the floor
constexpr double host_bar = 20e-6;       // seconds a buffer and pass beyond the bare calls

double seconds(const std::function<void()>& action) {
  const double start = MPI_Wtime();
  action();
  return MPI_Wtime() - start;
}

// The longest of all ranks.
double longest(const Session& session, double value) {
  MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_DOUBLE, MPI_MAX, session.world());
  return value;
}

// Units of one bf16 parameter each.
struct Units {
  Model model;
  std::vector<UnitId> units;

  Units(int count, std::int64_t bytes) {
    for (int i = 0; i < count; ++i) {
      units.push_back(model.unit("unit" + std::to_string(i)));
      (void)model.parameter(units.back(), "weight", {bytes / 2},
                            {.init = Init::constant(0), .dtype = DType::bf16});
    }
  }
};

void backward(Engine& engine, const std::vector<UnitId>& units) {
  for (auto unit = units.rbegin(); unit != units.rend(); ++unit) {
    engine.gradient(*unit, GradientMode::overwrite).reduce();
  }
}

std::string rate_text(double bytes, double time) {
  return number_text(bytes / time * 1e-9, 1, 7) + " GB/s";
}

// Gathers and reductions of units of one size, back to back, beside the bare calls between as many
// shards and buffers.
void measure_collectives(const Session& session, const Options& options, std::int64_t bytes,
                         Results& results) {
  // Many small ones: what a pass costs once, as the wait for its end, is not theirs.
  const int count =
      static_cast<int>(std::clamp<std::int64_t>((std::int64_t{4} << 30) / bytes, 8, 512));
  const Units units(count, bytes);
  Config config = device_config(options);
  config.optimizer = {.kind = OptimizerKind::sgd, .learning_rate = 0};
  Engine engine(session.world(), units.model, config);
  RawDevice raw(session.world(), bytes, config.slots, count);
  const Execution exec;

  const auto gather = [&] {
    engine.begin_evaluation();
    for (const UnitId unit : units.units) engine.gather(unit).end();
    engine.quiet(exec);
  };
  const auto raw_gather = [&] {
    for (int i = 0; i < count; ++i) raw.all_gather(bytes);
    raw.wait();
  };
  const auto reduce = [&] {
    backward(engine, units.units);
    engine.quiet(exec);
  };
  const auto raw_reduce = [&] {
    for (int i = 0; i < count; ++i) raw.reduce_scatter(bytes / 2);
    raw.wait();
  };
  const auto timed_alone = [&](const std::function<void()>& action) {
    MPI_Barrier(session.world());
    return longest(session, seconds(action)) / count;
  };
  const auto timed_reduce = [&] {
    engine.begin_micro_step({.samples = 1, .last = true});
    engine.quiet(exec);
    const double time = timed_alone(reduce);
    engine.step();
    engine.quiet(exec);
    return time;
  };
  std::array<std::vector<double>, 4> times;
  for (int round = 0; round < options.pairs + 2; ++round) {
    const std::array<double, 4> one{timed_alone(gather), timed_alone(raw_gather), timed_reduce(),
                                    timed_alone(raw_reduce)};
    if (round < 2) continue;
    for (std::size_t i = 0; i < one.size(); ++i) times[i].push_back(one[i]);
  }
  const double wire = static_cast<double>(bytes) * (session.size() - 1) / session.size();
  const char* const names[2] = {"gather", "reduce-scatter"};
  for (std::size_t i = 0; i < 2; ++i) {
    const double mine = median(times[2 * i]);
    const double bare = median(times[2 * i + 1]);
    const double share = ratio(times[2 * i + 1], times[2 * i]).median;
    const bool judged = bytes >= (std::int64_t{8} << 20);
    results.line("  " + padded_left(names[i], 16) + padded(bytes_text(bytes), 9) + "   mics " +
                 padded_left(time_text(mine), 8) + rate_text(wire, mine) + "   NCCL " +
                 padded_left(time_text(bare), 8) + rate_text(wire, bare) + "   speed " +
                 number_text(share, 3) + "  " +
                 (judged ? results.judge(share >= collective_bar, collective_bar) : "no bar"));
    results.record({{"operation", names[i]},
                    {"bytes", bytes},
                    {"seconds", mine},
                    {"bare_seconds", bare},
                    {"speed", share}});
  }
}

}  // namespace

int run_device(const Session& session, const Options& options) {
  Results results(session, "device", options.json);
  results.line("bus bandwidth of units back to back, bf16, beside the bare calls; median of " +
               std::to_string(options.pairs));
  for (const std::uint64_t bytes : options.sizes) {
    measure_collectives(session, options, static_cast<std::int64_t>(bytes), results);
  }
  return results.finish(options.check);
}

// A step of a GPT's parameters without its computation: every unit gathered forward and backward
// and reduced, then the optimizer.
int run_step(const Session& session, const Options& options) {
  Results results(session, "step", options.json);
  const StepModel gpt(static_cast<int>(options.sizes.at(0)));
  Config config = device_config(options);
  config.optimizer = {.kind = OptimizerKind::adamw, .learning_rate = 1e-4};
  Engine engine(session.world(), gpt.model, config);
  const Plan& plan = engine.plan();
  const Execution exec;
  std::vector<UnitId> units;
  for (const auto& unit : gpt.ids.units) units.push_back(unit.id);

  double host = 0;  // of gathers and reductions, without waiting
  const auto step = [&] {
    engine.begin_micro_step({.samples = 1, .last = true});
    host += seconds([&] {
      for (const UnitId unit : units) engine.gather(unit).end();
      for (auto unit = units.rbegin(); unit != units.rend(); ++unit) {
        const Lease lease = engine.gather(*unit);
        engine.gradient(*unit, GradientMode::overwrite).reduce();
      }
    });
    engine.step();
  };
  constexpr int steps = 20;
  for (int i = 0; i < 5; ++i) step();
  engine.quiet(exec);

  // The floor: the same buffers through the bare library, and the optimizer's bytes as a copy.
  std::int64_t largest = 0;
  std::int64_t trainable = 0;
  std::vector<std::int64_t> buffers;
  for (const auto& buffer : plan.flat().buffers()) {
    const std::int64_t bytes = buffer.flat.count() * bytes_of(buffer.dtype);
    if (bytes == 0) continue;
    buffers.push_back(bytes);
    largest = std::max(largest, bytes);
    trainable += buffer.trainable ? buffer.flat.shard_count() : 0;
  }
  RawDevice raw(session.world(), largest);
  const bool sharded = plan.layout().shard_size() > 1;
  const bool replicated = plan.layout().replicas() > 1;
  const auto bare = [&] {
    for (const std::int64_t bytes : buffers) {
      if (sharded) {
        raw.all_gather(bytes);
        raw.all_gather(bytes);
        raw.reduce_scatter(bytes / 2);
      }
      if (replicated) raw.all_reduce(bytes / 2 / plan.layout().shard_size());
    }
  };
  // AdamW reads gradient (2), master and two moments (12) and writes 12 and the compute copy (2);
  // the norm reads the gradient once.
  const double optimizer_bytes = 28.0 * static_cast<double>(trainable);
  const double norm_bytes = 2.0 * static_cast<double>(trainable);

  std::vector<double> mine;
  std::vector<double> floor;
  double copy_speed = 0;
  double raw_host = 0;  // of one step a round: many would fill the queue and wait in it
  host = 0;
  for (int round = 0; round < std::max(3, options.pairs / 8); ++round) {
    MPI_Barrier(session.world());
    mine.push_back(longest(session, seconds([&] {
                                      for (int i = 0; i < steps; ++i) step();
                                      engine.quiet(exec);
                                    }) / steps));
    MPI_Barrier(session.world());
    const double collectives = longest(session, seconds([&] {
                                                  for (int i = 0; i < steps; ++i) bare();
                                                  raw.wait();
                                                }) / steps);
    raw_host += seconds(bare);
    raw.wait();
    copy_speed = raw.copy_speed();
    floor.push_back(collectives + longest(session, (optimizer_bytes + norm_bytes) / copy_speed));
  }
  const auto rounds = static_cast<double>(mine.size());
  const double time = median(mine);
  const double least = median(floor);
  const double share = ratio(mine, floor).median;
  const auto passes = 3.0 * static_cast<double>(buffers.size());
  const double own_host = host / (rounds * steps) / passes;
  const double bare_host = raw_host / rounds / passes;
  results.line("  " + std::to_string(gpt.model.count()) + " parameters, p = " +
               std::to_string(plan.layout().shard_size()) + ", " + std::to_string(buffers.size()) +
               " buffers, arena " + bytes_text(engine.arena_bytes()));
  results.line("  a step " + time_text(time) + ", floor " + time_text(least) + " (copy " +
               number_text(copy_speed * 1e-9, 0) + " GB/s), ratio " + number_text(share, 3) + "  " +
               results.judge(share <= step_bar, step_bar));
  const double beyond = own_host - bare_host;
  results.line("  host, a buffer and pass: mics " + time_text(own_host) + ", bare " +
               time_text(bare_host) + ", beyond it " + time_text(beyond) + "  " +
               results.judge(beyond <= host_bar, host_bar * 1e6) + " us");
  results.record({{"parameters", gpt.model.count()},
                  {"seconds", time},
                  {"floor_seconds", least},
                  {"ratio", share},
                  {"host_seconds_beyond_bare", beyond},
                  {"copy_bytes_per_second", copy_speed}});
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
