// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/half.hpp>
#include <mics/optim/device_step.hpp>
#include <mics/optim/loss_scaler.hpp>
#include <mics/optim/norm.hpp>
#include <mics/optim/schedule.hpp>
#include <mics/state/for_blocks.hpp>
#include <support/device_array.hpp>

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

namespace mics::optim {
namespace {

using test::DeviceArray;

constexpr double infinity = std::numeric_limits<double>::infinity();

/// What one rank brings to a step.
struct Part {
  std::vector<std::vector<float>> sums;  ///< of each buffer
  std::vector<std::uint8_t> contributed;
  std::int64_t samples = 1;
  double loss = 0;
  std::uint64_t shard_history = 7;
  std::uint64_t replica_history = 11;
};

/// All ranks of a job in one process: place r * p + tau is shard tau of replica r. Their vectors
/// are added up here instead of by a transport.
class Job {
 public:
  explicit Job(DeviceStepSettings settings)
      : settings_(std::move(settings)), buffers_(static_cast<int>(settings_.factors.size())) {
    for (int rank = 0; rank < ranks(); ++rank) {
      settings_.shard = rank % settings_.shards;
      settings_.replica = rank / settings_.shards;
      const std::int64_t bytes = DeviceStep::bytes(buffers_, settings_.shards, settings_.replicas);
      memory_.emplace_back("mics::test::step", static_cast<std::size_t>(bytes));
      steps_.push_back(std::make_unique<DeviceStep>(
          std::span(memory_.back().data(), static_cast<std::size_t>(bytes)), Execution(),
          settings_));
      outcomes_.emplace_back(buffers_, 2);
    }
  }

  [[nodiscard]] int ranks() const { return settings_.shards * settings_.replicas; }
  [[nodiscard]] DeviceStep& at(int rank) { return *steps_[static_cast<std::size_t>(rank)]; }
  void set_rates(std::int64_t first, const std::vector<Rates>& rates) {
    for (const auto& step : steps_) step->set_rates(first, rates);
  }

  void step(const std::vector<Part>& parts) {
    ++calls_;
    std::vector<DeviceArray<float>> kept;
    for (int rank = 0; rank < ranks(); ++rank) {
      const Part& part = parts[static_cast<std::size_t>(rank)];
      DeviceStep& step = at(rank);
      device::copy(Execution(), step.loss(), &part.loss, sizeof(double));
      Execution().fence("test");
      step.begin();
      for (int b = 0; b < buffers_; ++b) {
        const auto& sums = part.sums[static_cast<std::size_t>(b)];
        kept.emplace_back(sums);
        step.add_squares(b, kept.back().data(), DType::fp32, std::ssize(sums));
      }
      step.publish_group(part.samples, part.shard_history, part.contributed);
    }
    for (int r = 0; r < settings_.replicas; ++r) {
      std::vector<int> group;
      for (int s = 0; s < settings_.shards; ++s) group.push_back(r * settings_.shards + s);
      all_reduce(group, &DeviceStep::group_vector, at(0).group_count());
    }
    for (int rank = 0; rank < ranks(); ++rank) {
      at(rank).fold_group(parts[static_cast<std::size_t>(rank)].replica_history);
    }
    for (int s = 0; s < settings_.shards; ++s) {
      std::vector<int> group;
      for (int r = 0; r < settings_.replicas; ++r) group.push_back(r * settings_.shards + s);
      all_reduce(group, &DeviceStep::replica_vector, at(0).replica_count());
    }
    for (int rank = 0; rank < ranks(); ++rank) {
      at(rank).decide(outcomes_[static_cast<std::size_t>(rank)], calls_ % 2);
    }
    Execution().fence("test");
  }

  [[nodiscard]] const StepOutcome& outcome(int rank) const {
    return outcomes_[static_cast<std::size_t>(rank)].outcome(calls_ % 2);
  }
  [[nodiscard]] std::vector<std::uint8_t> contributed(int rank) const {
    const auto flags = outcomes_[static_cast<std::size_t>(rank)].contributed(calls_ % 2);
    return {flags.begin(), flags.end()};
  }
  [[nodiscard]] std::vector<DeviceStepInfo> infos(int rank) {
    return copied<DeviceStepInfo>(at(rank).info(0), buffers_);
  }
  [[nodiscard]] double scalar(const double* value) { return copied<double>(value, 1)[0]; }

 private:
  template <class T>
  std::vector<T> copied(const T* from, std::int64_t count) {
    std::vector<T> values(static_cast<std::size_t>(count));
    device::copy(Execution(), values.data(), from, count * static_cast<std::int64_t>(sizeof(T)));
    Execution().fence("test");
    return values;
  }
  void all_reduce(const std::vector<int>& group, double* (DeviceStep::*vector)() const,
                  std::int64_t count) {
    std::vector<double> sums(static_cast<std::size_t>(count));
    for (const int rank : group) {
      const std::vector<double> own = copied<double>((at(rank).*vector)(), count);
      for (std::size_t i = 0; i < sums.size(); ++i) sums[i] += own[i];
    }
    for (const int rank : group) {
      device::copy(Execution(), (at(rank).*vector)(), sums.data(),
                   count * static_cast<std::int64_t>(sizeof(double)));
      Execution().fence("test");
    }
  }

  DeviceStepSettings settings_;
  int buffers_;
  int calls_ = 0;
  std::vector<Kokkos::View<std::byte*, device::MemorySpace>> memory_;
  std::vector<std::unique_ptr<DeviceStep>> steps_;
  std::vector<OutcomeRing> outcomes_;
};

/// The step of a host, written down plainly.
class Reference {
 public:
  explicit Reference(const DeviceStepSettings& settings)
      : settings_(settings), scaler_(settings.loss_scale), updates_(settings.factors.size()) {}

  struct Result {
    StepOutcome outcome;
    std::vector<std::uint8_t> contributed;
    std::vector<DeviceStepInfo> infos;
  };

  // `parts` as for Job; squares of replica 0 count, as replicas hold the same sums.
  Result step(const std::vector<Part>& parts, const Rates& rates) {
    Result result;
    StepOutcome& outcome = result.outcome;
    const std::size_t buffers = settings_.factors.size();
    double squares = 0;
    double loss = 0;
    result.contributed.assign(buffers, 0);
    for (std::size_t rank = 0; rank < parts.size(); ++rank) {
      const Part& part = parts[rank];
      loss += part.loss;
      outcome.samples += part.samples;
      for (std::size_t b = 0; b < buffers; ++b) {
        result.contributed[b] |= part.contributed[b] != 0 && !part.sums[b].empty() ? 1 : 0;
        if (rank >= static_cast<std::size_t>(settings_.shards)) continue;
        for (const float x : part.sums[b]) {
          squares += static_cast<double>(x) * static_cast<double>(x) /
                     (settings_.factors[b] * settings_.factors[b]);
        }
      }
    }
    outcome.loss_scale = scaler_.scale();
    const double divisor = outcome.loss_scale * static_cast<double>(outcome.samples);
    outcome.loss = loss / static_cast<double>(outcome.samples);
    outcome.gradient_norm = std::sqrt(squares) / divisor;
    outcome.learning_rate = rates.learning_rate;
    outcome.overflow = std::isfinite(squares) ? 0 : 1;
    outcome.skipped = outcome.samples == 0 || !std::isfinite(outcome.gradient_norm) ? 1 : 0;
    if (outcome.samples > 0) {
      try {
        scaler_.update(outcome.skipped != 0);
      } catch (const StateError&) {
        outcome.scale_exhausted = 1;
      }
    }
    if (outcome.skipped == 0) ++steps_;
    outcome.step = steps_;
    const double limit = settings_.gradient_clipping;
    const double clip = limit > 0 ? 1 / std::max(1.0, (outcome.gradient_norm + 1e-6) / limit) : 1.0;
    const auto betas = rates.betas.value_or(settings_.betas);
    for (std::size_t b = 0; b < buffers; ++b) {
      DeviceStepInfo info;
      info.update = outcome.skipped == 0 && result.contributed[b] != 0 ? 1 : 0;
      if (info.update != 0) {
        info.step = ++updates_[b];
        info.learning_rate = rates.learning_rate;
        info.beta1 = betas[0];
        info.beta2 = betas[1];
        const auto step = static_cast<double>(info.step);
        info.correction1 = settings_.bias_correction ? 1 - std::pow(betas[0], step) : 1;
        info.correction2 = settings_.bias_correction ? 1 - std::pow(betas[1], step) : 1;
        info.gradient_scale = clip / divisor / settings_.factors[b];
      }
      result.infos.push_back(info);
    }
    return result;
  }
  [[nodiscard]] double scale() const { return scaler_.scale(); }
  [[nodiscard]] std::int64_t steps() const { return steps_; }
  [[nodiscard]] const LossScaler& scaler() const { return scaler_; }
  [[nodiscard]] const std::vector<std::int64_t>& updates() const { return updates_; }

 private:
  DeviceStepSettings settings_;
  LossScaler scaler_;
  std::int64_t steps_ = 0;
  std::vector<std::int64_t> updates_;
};

// Equal numbers; NaN equals NaN.
void expect_same(double found, double expected, const char* what) {
  if (std::isnan(expected)) {
    EXPECT_TRUE(std::isnan(found)) << what;
  } else if (std::isinf(expected)) {
    EXPECT_EQ(found, expected) << what;
  } else {
    EXPECT_DOUBLE_EQ(found, expected) << what;
  }
}

void expect_step(Job& job, const Reference::Result& expected, double next_scale) {
  for (int rank = 0; rank < job.ranks(); ++rank) {
    SCOPED_TRACE("rank " + std::to_string(rank));
    const StepOutcome& found = job.outcome(rank);
    EXPECT_EQ(found.step, expected.outcome.step);
    EXPECT_EQ(found.samples, expected.outcome.samples);
    expect_same(found.loss, expected.outcome.loss, "loss");
    expect_same(found.gradient_norm, expected.outcome.gradient_norm, "norm");
    EXPECT_EQ(found.learning_rate, expected.outcome.learning_rate);
    EXPECT_EQ(found.loss_scale, expected.outcome.loss_scale);
    EXPECT_EQ(found.skipped, expected.outcome.skipped);
    EXPECT_EQ(found.overflow, expected.outcome.overflow);
    EXPECT_EQ(found.scale_exhausted, expected.outcome.scale_exhausted);
    EXPECT_EQ(found.betas_out_of_range, 0);
    EXPECT_EQ(found.desync_shard, -1);
    EXPECT_EQ(found.desync_replica, -1);
    EXPECT_EQ(job.contributed(rank), expected.contributed);
    EXPECT_EQ(job.scalar(job.at(rank).loss()), 0.0);
    EXPECT_EQ(job.scalar(job.at(rank).loss_scale()), next_scale);
    const std::vector<DeviceStepInfo> infos = job.infos(rank);
    for (std::size_t b = 0; b < infos.size(); ++b) {
      const DeviceStepInfo& own = expected.infos[b];
      ASSERT_EQ(infos[b].update, own.update) << "buffer " << b;
      if (own.update == 0) continue;
      EXPECT_EQ(infos[b].step, own.step) << "buffer " << b;
      EXPECT_EQ(infos[b].learning_rate, own.learning_rate);
      EXPECT_EQ(infos[b].beta1, own.beta1);
      EXPECT_EQ(infos[b].beta2, own.beta2);
      EXPECT_DOUBLE_EQ(infos[b].correction1, own.correction1);
      EXPECT_DOUBLE_EQ(infos[b].correction2, own.correction2);
      EXPECT_DOUBLE_EQ(infos[b].gradient_scale, own.gradient_scale);
    }
  }
}

// Numbers that look random: a step, a rank and a buffer give the same ones every time.
std::vector<float> numbers(std::size_t count, int seed) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t x = (i * 2654435761U + static_cast<std::size_t>(seed) * 40503U) % 1009;
    values[i] = (static_cast<float>(x) - 504.0F) / 64.0F;
  }
  return values;
}

void expect_training(int shards, int replicas) {
  SCOPED_TRACE(std::to_string(shards) + " shards, " + std::to_string(replicas) + " replicas");
  const std::vector<std::size_t> counts{1000, 4096, 0, 9001, 17};
  DeviceStepSettings settings{
      .factors = {1, 2, 1, 8, 4},
      .shards = shards,
      .replicas = replicas,
      .loss_scale = {.dynamic = true, .initial = 16, .window = 3, .hysteresis = 2, .minimum = 4},
      .gradient_clipping = 1.5};
  Job job(settings);
  Reference reference(settings);
  const Schedule schedule({.kind = ScheduleKind::one_cycle,
                           .cycle_min_lr = 0.1,
                           .cycle_max_lr = 0.5,
                           .cycle_first_step_size = 4},
                          0.1);
  std::vector<Rates> table;
  for (int s = 0; s < 12; ++s) table.push_back(schedule.rates(s));
  job.set_rates(0, table);
  int exhausted = 0;
  int scales = 0;
  double last_scale = reference.scale();
  for (int s = 0; s < 40; ++s) {
    SCOPED_TRACE("step " + std::to_string(s));
    std::vector<Part> parts(static_cast<std::size_t>(job.ranks()));
    for (int rank = 0; rank < job.ranks(); ++rank) {
      Part& part = parts[static_cast<std::size_t>(rank)];
      for (std::size_t b = 0; b < counts.size(); ++b) {
        // Replicas hold the same sums.
        part.sums.push_back(numbers(counts[b], s * 100 + rank % shards * 10 + static_cast<int>(b)));
        if (s % 5 == 2) {
          for (float& x : part.sums.back()) x /= 8192;  // below the limit of the norm
        }
        // Nobody contributes to buffer 4 in some steps, and one replica alone to buffer 1.
        const bool own = (b != 4 || s % 3 != 0) && (b != 1 || rank / shards == replicas - 1);
        part.contributed.push_back(own ? 1 : 0);
      }
      part.samples = s % 11 == 4 ? 0 : rank + s % 3;
      if (s % 11 != 4) part.samples += rank == 0 ? 1 : 0;
      part.loss = 0.5 * rank + s;
      part.shard_history = static_cast<std::uint64_t>(s) * 0x9E3779B97F4A7C15ULL + 1;
      part.replica_history = ~part.shard_history;
    }
    const bool bad = s == 7 || s == 8 || s == 9 || (s >= 20 && s < 28);
    if (bad) {
      for (std::size_t rank = 0; rank < parts.size(); ++rank) {
        if (static_cast<int>(rank) % shards != shards - 1) continue;
        parts[rank].sums[3][8999] = s % 2 == 0 ? std::numeric_limits<float>::quiet_NaN()
                                               : std::numeric_limits<float>::infinity();
      }
    }
    const std::int64_t position = std::min<std::int64_t>(reference.steps(), 11);

    job.step(parts);

    const Reference::Result expected =
        reference.step(parts, table[static_cast<std::size_t>(position)]);
    expect_step(job, expected, reference.scale());
    exhausted += expected.outcome.scale_exhausted;
    scales += reference.scale() != last_scale ? 1 : 0;
    last_scale = reference.scale();
    if (testing::Test::HasFailure()) return;
  }
  // The sequence has met what it is for.
  EXPECT_GT(exhausted, 0);
  EXPECT_GT(scales, 3);
  const DeviceStepState state = job.at(job.ranks() - 1).state();
  EXPECT_EQ(state.steps, reference.steps());
  EXPECT_EQ(state.scaler, reference.scaler().state());
  EXPECT_EQ(state.updates, reference.updates());
}

TEST(DeviceStepTest, DecidesAsTheHostDoes) {
  expect_training(1, 1);
  expect_training(3, 1);
  expect_training(1, 3);
  expect_training(2, 2);
}

TEST(DeviceStepTest, AllRanksHaveTheSameBits) {
  DeviceStepSettings settings{.factors = {3}, .shards = 5, .gradient_clipping = 0.1};
  Job job(settings);
  job.set_rates(0, {{.learning_rate = 0.5}});
  std::vector<Part> parts(5);
  for (int rank = 0; rank < 5; ++rank) {
    parts[static_cast<std::size_t>(rank)] = {
        .sums = {numbers(10'000, rank)}, .contributed = {1}, .loss = 0.1 * rank};
  }

  job.step(parts);

  for (int rank = 1; rank < 5; ++rank) {
    EXPECT_EQ(job.outcome(rank).gradient_norm, job.outcome(0).gradient_norm);
    EXPECT_EQ(job.outcome(rank).loss, job.outcome(0).loss);
    EXPECT_EQ(job.infos(rank)[0].gradient_scale, job.infos(0)[0].gradient_scale);
  }
}

TEST(DeviceStepTest, NamesTheFirstRankWithAnotherHistoryAndChangesNothing) {
  for (const bool in_shard : {true, false}) {
    DeviceStepSettings settings{.factors = {1},
                                .shards = 3,
                                .replicas = 2,
                                .loss_scale = {.dynamic = true, .initial = 8, .window = 1}};
    Job job(settings);
    job.set_rates(0, {{.learning_rate = 0.5}});
    std::vector<Part> parts(6, {.sums = {{1, 2, 3}}, .contributed = {1}});
    job.step(parts);
    const DeviceStepState before = job.at(4).state();
    // Rank 4 is shard 1 of replica 1. The histories differ in the upper half alone.
    (in_shard ? parts[4].shard_history : parts[4].replica_history) |= std::uint64_t{1} << 60;

    job.step(parts);

    const auto of = [&](int rank) {
      return std::pair(job.outcome(rank).desync_shard, job.outcome(rank).desync_replica);
    };
    if (in_shard) {
      EXPECT_EQ(of(0), std::pair(-1, -1));
      EXPECT_EQ(of(3), std::pair(1, -1));
      EXPECT_EQ(of(4), std::pair(0, -1));
      EXPECT_EQ(of(5), std::pair(1, -1));
    } else {
      EXPECT_EQ(of(0), std::pair(-1, -1));
      EXPECT_EQ(of(1), std::pair(-1, 1));
      EXPECT_EQ(of(4), std::pair(-1, 0));
    }
    EXPECT_EQ(job.outcome(4).skipped, 1);
    EXPECT_EQ(job.infos(4)[0].update, 0);
    const DeviceStepState after = job.at(4).state();
    EXPECT_EQ(after.steps, before.steps);
    EXPECT_EQ(after.scaler, before.scaler);
    EXPECT_EQ(after.updates, before.updates);
  }
}

TEST(DeviceStepTest, SkipsAStepWhoseBetasCannotBe) {
  Job job({.factors = {1}});
  job.set_rates(0, {{.learning_rate = 0.5, .betas = {{1.0, 0.99}}}});

  job.step({{.sums = {{1, 2}}, .contributed = {1}}});

  EXPECT_EQ(job.outcome(0).betas_out_of_range, 1);
  EXPECT_EQ(job.outcome(0).skipped, 1);
  EXPECT_EQ(job.outcome(0).step, 0);
  EXPECT_EQ(job.infos(0)[0].update, 0);
}

// The bits of a sum of squares: 512 columns of blocks, in each 256 lanes, then trees.
template <class T>
double sum_in_order(const std::vector<T>& values) {
  constexpr std::size_t width = 16 / sizeof(T);
  const auto tree = [](std::vector<double> sums) {
    for (std::size_t rest = sums.size() / 2; rest > 0; rest /= 2) {
      for (std::size_t i = 0; i < rest; ++i) sums[i] += sums[i + rest];
    }
    return sums[0];
  };
  std::vector<std::vector<double>> lanes(512, std::vector<double>(256));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const auto x = static_cast<double>(values[i]);
    lanes[i / 4096 % 512][i % 4096 / width % 256] += x * x;
  }
  std::vector<double> columns;
  for (const auto& column : lanes) columns.push_back(tree(column));
  // Lane l of the fold takes the columns l and l + 256.
  std::vector<double> folded(256);
  for (std::size_t c = 0; c < columns.size(); ++c) folded[c % 256] += columns[c];
  return tree(folded);
}

template <class T>
double norm_of(const std::vector<T>& values, std::size_t skipped = 0) {
  const std::int64_t bytes = DeviceStep::bytes(1, 1, 1);
  const Kokkos::View<std::byte*, device::MemorySpace> memory("mics::test::step",
                                                             static_cast<std::size_t>(bytes));
  DeviceStep step(std::span(memory.data(), static_cast<std::size_t>(bytes)), Execution(),
                  {.factors = {1}});
  const DeviceArray<T> sums(values, skipped);
  step.begin();
  step.add_squares(0, sums.data(), dtype_of<T>, std::ssize(values));
  step.publish_group(1, 0, std::vector<std::uint8_t>{1});
  double squares = 0;
  device::copy(Execution(), &squares, step.group_vector(), sizeof(double));
  Execution().fence("test");
  return squares;
}

template <class T>
void expect_bits_of_the_definition() {
  for (const std::size_t count : {0UL, 1UL, 7UL, 4095UL, 4096UL, 4097UL, 2'200'001UL}) {
    std::vector<T> values(count);
    for (std::size_t i = 0; i < count; ++i) {
      values[i] = T(std::sin(static_cast<double>(i)));
    }
    const double expected = sum_in_order(values);
    EXPECT_EQ(norm_of(values), expected) << count;
    EXPECT_EQ(norm_of(values, 1), expected) << count << " elements, not aligned";
    std::vector<double> partials(
        static_cast<std::size_t>(state::blocks_of(static_cast<std::int64_t>(count))));
    EXPECT_NEAR(
        expected,
        sum_of_squares(values.data(), dtype_of<T>, static_cast<std::int64_t>(count), partials),
        1e-12 * expected);
  }
}

TEST(DeviceNormTest, HasTheBitsOfTheDefinition) {
  expect_bits_of_the_definition<double>();
  expect_bits_of_the_definition<float>();
  expect_bits_of_the_definition<bf16>();
  expect_bits_of_the_definition<fp16>();
}

TEST(DeviceNormTest, IsFiniteExactlyIfEveryElementIs) {
  for (const std::size_t position : {0UL, 4097UL, 9999UL}) {
    std::vector<float> values(10'000, std::numeric_limits<float>::max());
    EXPECT_TRUE(std::isfinite(norm_of(values)));
    values[position] = std::numeric_limits<float>::infinity();
    EXPECT_EQ(norm_of(values), infinity);
    values[position] = std::numeric_limits<float>::quiet_NaN();
    EXPECT_TRUE(std::isnan(norm_of(values)));
  }
}

TEST(DeviceStepTest, TakesThousandsOfBuffers) {
  constexpr std::size_t count = 3000;
  DeviceStepSettings settings{.factors = std::vector<double>(count, 2.0)};
  Job job(settings);
  job.set_rates(0, {{.learning_rate = 0.5}});
  Part part{.sums = std::vector<std::vector<float>>(count, {2.0F}),
            .contributed = std::vector<std::uint8_t>(count)};
  for (std::size_t b = 0; b < count; ++b) part.contributed[b] = b % 7 == 3 ? 1 : 0;

  job.step({part});

  EXPECT_DOUBLE_EQ(job.outcome(0).gradient_norm, std::sqrt(static_cast<double>(count)));
  EXPECT_EQ(job.contributed(0), part.contributed);
  const std::vector<DeviceStepInfo> infos = job.infos(0);
  for (std::size_t b = 0; b < count; ++b) {
    ASSERT_EQ(infos[b].update, part.contributed[b]) << b;
  }
}

TEST(DeviceStepTest, ForgetsTheSumsOfTheStepBefore) {
  Job job({.factors = {1, 1}});
  job.set_rates(0, {{.learning_rate = 0.5}});
  job.step({{.sums = {std::vector<float>(9000, 1.0F), {3.0F}}, .contributed = {1, 1}}});

  job.step({{.sums = {{}, {4.0F}}, .contributed = {0, 1}}});

  EXPECT_EQ(job.outcome(0).gradient_norm, 4.0);
}

// The rate of every step, with the table told in pieces that go around the ring.
TEST(DeviceStepTest, FollowsATableLongerThanTheRing) {
  Job job({.factors = {1}});
  const auto rate = [](std::int64_t s) { return static_cast<double>(s) + 0.5; };
  const auto table = [&](std::int64_t first, std::int64_t end) {
    std::vector<Rates> rates;
    for (std::int64_t s = first; s < end; ++s) rates.push_back({.learning_rate = rate(s)});
    return rates;
  };
  std::int64_t known = 0;
  const Part part{.sums = {{1}}, .contributed = {1}};
  for (std::int64_t s = 0; s < 5000; s += 1) {
    if (s == known) {
      job.set_rates(known, table(known, known + 1500));
      known += 1500;
    }
    job.step({part});
    ASSERT_EQ(job.outcome(0).learning_rate, rate(s)) << s;
  }
  // A shorter table: its last rate stays.
  job.set_rates(5000, table(10, 12));
  for (const double expected : {10.5, 11.5, 11.5}) {
    job.step({part});
    EXPECT_EQ(job.outcome(0).learning_rate, expected);
  }
}

TEST(DeviceStepTest, GoesOnFromASavedState) {
  const DeviceStepSettings settings{.factors = {1, 1},
                                    .loss_scale = {.dynamic = true, .initial = 8, .window = 2}};
  Job first(settings);
  Job second(settings);
  std::vector<Rates> table;
  for (int s = 0; s < 20; ++s) table.push_back({.learning_rate = 0.125 * s});
  first.set_rates(0, table);
  second.set_rates(0, table);
  const auto part = [](int s) {
    return Part{.sums = {numbers(100, s), numbers(50, s + 1)},
                .contributed = {1, static_cast<std::uint8_t>(s % 2)}};
  };
  for (int s = 0; s < 7; ++s) first.step({part(s)});

  second.at(0).restore(first.at(0).state());
  EXPECT_EQ(second.scalar(second.at(0).loss_scale()), first.scalar(first.at(0).loss_scale()));
  first.step({part(7)});
  second.step({part(7)});

  EXPECT_EQ(second.outcome(0).step, 8);
  EXPECT_EQ(second.outcome(0).learning_rate, first.outcome(0).learning_rate);
  EXPECT_EQ(second.outcome(0).loss_scale, first.outcome(0).loss_scale);
  EXPECT_EQ(second.infos(0)[1].step, first.infos(0)[1].step);
  EXPECT_EQ(second.infos(0)[1].step, 4);
}

template <class E, class F>
std::string message_of(const F& f) {
  try {
    f();
  } catch (const E& error) {
    return error.what();
  }
  return "no error";
}

TEST(DeviceStepTest, RefusesWhatCannotBe) {
  const auto contains = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  Job job({.factors = {1}});
  contains(message_of<StateError>([&] { job.step({{.sums = {{1}}, .contributed = {1}}}); }),
           "expected rates of at least one step");
  contains(message_of<ArgumentError>([&] { job.set_rates(0, {}); }), "found 0");
  contains(message_of<ArgumentError>([&] {
             job.set_rates(
                 0, std::vector<Rates>(static_cast<std::size_t>(DeviceStep::rate_capacity + 1)));
           }),
           "found 4097");
  contains(message_of<ArgumentError>(
               [&] { job.at(0).publish_group(1, 0, std::vector<std::uint8_t>(2)); }),
           "contributed buffers of a step: expected 1, found 2");
  contains(message_of<ArgumentError>([&] { job.at(0).restore({}); }),
           "expected 1 counts of updates, found 0");
  contains(message_of<ArgumentError>([&] {
             std::vector<std::byte> small(8);
             DeviceStep(small, Execution(), {.factors = {1}});
           }),
           "memory of a device step");
}

}  // namespace
}  // namespace mics::optim
