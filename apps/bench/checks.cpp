// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/race.hpp>
#include <bench/results.hpp>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

namespace mics::apps::bench {
namespace {

constexpr double checks_bar = 0.01;  // of a step
constexpr int unit_count = 16;
constexpr int operations_per_timing = 10'000;

/// Units of one parameter each, trained by passes that compute nothing: a step then costs its
/// communication and the optimizer, and the share of the checks is at its largest.
class EmptyTraining {
 public:
  EmptyTraining(const Session& session, const Config& config, std::int64_t unit_bytes) {
    for (int i = 0; i < unit_count; ++i) {
      const UnitId unit = model_.unit("unit" + std::to_string(i));
      units_.push_back(unit);
      weights_.push_back(model_.parameter(unit, "weight",
                                          {std::max<std::int64_t>(1, unit_bytes / 4)},
                                          {.init = Init::normal(0.02)}));
    }
    engine_ = std::make_unique<Engine>(session.world(), model_, config);
  }
  void step() {
    engine_->begin_micro_step({.samples = 1, .last = true});
    for (const UnitId unit : units_) engine_->gather(unit).end();
    for (std::size_t u = units_.size(); u-- > 0;) {
      const Lease lease = engine_->gather(units_[u]);
      GradientScope scope = engine_->gradient(units_[u], GradientMode::overwrite);
      const auto gradient = scope.view<float*>(weights_[u]);
      Kokkos::deep_copy(gradient, 1.0F);
      scope.reduce();
    }
    engine_->step();
  }
  [[nodiscard]] Engine& engine() { return *engine_; }

 private:
  Model model_;
  std::vector<UnitId> units_;
  std::vector<ParameterId> weights_;
  std::unique_ptr<Engine> engine_;
};

// What every collective pays for being told apart from others, seconds.
double seconds_an_operation() {
  comm::OperationLog log;
  std::vector<std::string> names;
  for (int i = 0; i < unit_count; ++i) names.push_back("unit" + std::to_string(i));
  std::uint64_t history = 0;
  const double start = MPI_Wtime();
  for (int i = 0; i < operations_per_timing; ++i) {
    const comm::Operation operation{comm::Purpose::gather,
                                    names[static_cast<std::size_t>(i % unit_count)], 1 << 20};
    log.record(operation);
    history = hash_combine(history, operation.fingerprint());
  }
  // The sum is used, so that the loop stays.
  return (MPI_Wtime() - start) / operations_per_timing + static_cast<double>(history & 1U) * 1e-30;
}

void measure(const Session& session, const Options& options, std::int64_t unit_bytes,
             Results& results) {
  Config config = engine_config(options);
  // Two replicas where the ranks allow it, so that there is something to compare.
  if (options.preset.empty() && options.shard_size == 0 && session.size() % 2 == 0) {
    config.preset = Preset::mics;
    config.shard_size = session.size() / 2;
  }
  const std::int64_t every = config.replica_check_every;
  config.replica_check_every = 0;
  EmptyTraining plain(session, config, unit_bytes);
  config.replica_check_every = 1;
  EmptyTraining checked(session, config, unit_bytes);

  const std::vector<Runner> runners{{.name = "plain", .run = [&] { plain.step(); }},
                                    {.name = "checked", .run = [&] { checked.step(); }}};
  const Times times = race(session.world(), runners, options.pairs);
  const std::int64_t before = plain.engine().operations().total();
  plain.step();
  const auto operations = static_cast<double>(plain.engine().operations().total() - before);

  const double step = median(times[0]);
  const double comparison = std::max(0.0, median(times[1]) - step);
  const double identification = seconds_an_operation() * operations;
  double share = (comparison / static_cast<double>(every) + identification) / step;
  MPI_Allreduce(MPI_IN_PLACE, &share, 1, MPI_DOUBLE, MPI_MAX, session.world());
  results.line(padded(bytes_text(unit_bytes), 8) + padded(time_text(step), 11) +
               padded(time_text(identification), 14) + padded(time_text(comparison), 13) +
               padded(std::to_string(every), 8) + number_text(share * 100, 3, 9) + " %  " +
               results.judge(share <= checks_bar, checks_bar));
  results.record({{"unit_bytes", unit_bytes},
                  {"units", unit_count},
                  {"shard_size", plain.engine().plan().layout().shard_size()},
                  {"step_seconds", step},
                  {"identification_seconds", identification},
                  {"comparison_seconds", comparison},
                  {"compared_every", every},
                  {"share", share},
                  {"bar", checks_bar}});
}

}  // namespace

int run_checks(const Session& session, const Options& options) {
  Results results(session, "checks", options.json);
  results.line("Checks of ranks against each other beside a step of " + std::to_string(unit_count) +
               " units without compute, " + std::to_string(session.size()) +
               " rank(s), medians of " + std::to_string(options.pairs) + " steps in turn.");
  results.line("   unit       step  operations'  a comparison   every     share");
  for (const std::uint64_t size : options.sizes) {
    measure(session, options, static_cast<std::int64_t>(size), results);
  }
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
