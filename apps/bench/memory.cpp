// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/results.hpp>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

namespace mics::apps::bench {
namespace {

// A rank's resident memory, everything that the engine causes included (messages of MPI, page
// granularity), over what the plan said before the job.
constexpr double memory_bar = 1.10;
constexpr int layer_count = 24;
constexpr int steps = 3;
constexpr int micro_steps = 2;

/// A number of /proc/self/status, in bytes.
std::int64_t process_memory(const std::string& key) {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    std::int64_t kibibytes = 0;
    if (word == key + ':' && status >> kibibytes) return 1024 * kibibytes;
  }
  raise<StateError>({.object = "/proc/self/status",
                     .expected = "a line " + key,
                     .found = "none",
                     .remedy = "this measurement needs Linux"});
}

/// The peak so far is forgotten where the system allows it; else an earlier one may count.
void reset_peak() { std::ofstream("/proc/self/clear_refs") << "5"; }

struct Layer {
  UnitId unit;
  ParameterId weight;
};

/// Forward and backward passes with gradients as large as real ones: d(sum of w^2)/dw.
void train(Engine& engine, const std::vector<Layer>& layers) {
  using Host = Kokkos::DefaultHostExecutionSpace;
  for (int step = 0; step < steps; ++step) {
    for (int micro_step = 0; micro_step < micro_steps; ++micro_step) {
      engine.begin_micro_step({.samples = 1, .last = micro_step + 1 == micro_steps});
      for (const Layer& layer : layers) {
        const Lease lease = engine.gather(layer.unit);
        const auto w = lease.view<const float*>(layer.weight);
        double sum = 0;
        Kokkos::parallel_reduce(
            "mics::bench::forward", Kokkos::RangePolicy<Host>(0, w.extent_int(0)),
            [=](std::int64_t i, double& partial) { partial += w(i) * w(i); }, sum);
        engine.loss()() += sum;
      }
      for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) {
        const Lease lease = engine.gather(layer->unit);
        GradientScope scope = engine.gradient(layer->unit);
        const auto w = lease.view<const float*>(layer->weight);
        const auto dw = scope.view<float*>(layer->weight);
        Kokkos::parallel_for("mics::bench::backward", Kokkos::RangePolicy<Host>(0, w.extent_int(0)),
                             [=](std::int64_t i) { dw(i) += 2 * w(i); });
        scope.reduce();
      }
    }
    engine.step();
  }
}

void measure(const Session& session, const Options& options, std::int64_t bytes, Results& results) {
  const Config config = engine_config(options);
  // AdamW in fp32 keeps weight, two moments and the summed gradient of each element of a shard.
  const std::int64_t elements =
      bytes / 16 *
      config.shard_size_for(std::vector<int>(static_cast<std::size_t>(session.size()), 0));
  Model model;
  std::vector<Layer> layers;
  for (int i = 0; i < layer_count; ++i) {
    const UnitId unit = model.unit("layer" + std::to_string(i));
    layers.push_back(
        {unit, model.parameter(unit, "weight", {std::max<std::int64_t>(1, elements / layer_count)},
                               {.init = Init::normal(0.02)})});
  }

  reset_peak();
  const std::int64_t before = process_memory("VmRSS");
  Engine engine(session.world(), model, config);
  train(engine, layers);
  const std::int64_t used = process_memory("VmHWM") - before;

  const MemoryPlan& plan = engine.plan().memory();
  double ratio = static_cast<double>(used) / static_cast<double>(plan.total());
  std::int64_t most = used;
  MPI_Allreduce(MPI_IN_PLACE, &ratio, 1, MPI_DOUBLE, MPI_MAX, session.world());
  MPI_Allreduce(MPI_IN_PLACE, &most, 1, MPI_INT64_T, MPI_MAX, session.world());
  const std::int64_t state =
      plan.compute_shards + plan.master_weights + plan.optimizer_states + plan.accumulators;
  results.line(padded_left(engine.plan().request().preset, 7) +
               padded(std::to_string(engine.plan().layout().shard_size()), 4) +
               padded(bytes_text(state), 12) + padded(bytes_text(plan.total()), 12) +
               padded(bytes_text(most), 12) + number_text(ratio, 3, 8) + "  " +
               results.judge(ratio <= memory_bar, memory_bar));
  results.record({{"preset", engine.plan().request().preset},
                  {"shard_size", engine.plan().layout().shard_size()},
                  {"elements", model.count()},
                  {"state_bytes", state},
                  {"plan_bytes", plan.total()},
                  {"peak_bytes", most},
                  {"ratio", ratio},
                  {"bar", memory_bar}});
}

}  // namespace

int run_memory(const Session& session, const Options& options) {
  Results results(session, "memory", options.json);
  results.line(
      "Peak resident memory a rank above that before the engine, beside the plan's total, " +
      std::to_string(session.size()) + " rank(s); the largest of all.");
  results.line("preset    p       state        plan        peak   ratio");
  for (const std::uint64_t size : options.sizes) {
    measure(session, options, static_cast<std::int64_t>(size), results);
  }
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
