// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/engine/config.hpp>
#include <mics/engine/detail/config_section.hpp>
#include <mics/optim/device_step.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <source_location>
#include <utility>

namespace mics {
namespace {

using detail::refuse;
using detail::text_of;

struct Problem {
  std::string key;
  std::string expected;
  std::string found;
  std::string remedy = {};
};

class Problems {
 public:
  void add(const std::string& key, const std::string& expected, const std::string& found,
           const std::string& remedy = {}) {
    found_.push_back({key, expected, found, remedy});
  }
  void require(bool good, const std::string& key, const std::string& expected,
               const std::string& found, const std::string& remedy = {}) {
    if (!good) add(key, expected, found, remedy);
  }
  void finite(const std::string& key, double value, double lowest,
              double highest = std::numeric_limits<double>::infinity()) {
    if (std::isfinite(value) && value >= lowest && value <= highest) return;
    std::string range = "a finite number of at least " + text_of(lowest);
    if (std::isfinite(highest)) range += " and at most " + text_of(highest);
    add(key, range, text_of(value));
  }
  void positive(const std::string& key, double value) {
    if (std::isfinite(value) && value > 0) return;
    add(key, "a finite number of more than 0", text_of(value));
  }
  void at_least(const std::string& key, std::int64_t value, std::int64_t lowest,
                std::int64_t highest = INT64_MAX) {
    if (value >= lowest && value <= highest) return;
    std::string range = "at least " + std::to_string(lowest);
    if (highest != INT64_MAX) range += " and at most " + std::to_string(highest);
    add(key, range, std::to_string(value));
  }
  [[nodiscard]] std::vector<Problem> take() { return std::move(found_); }

 private:
  std::vector<Problem> found_;
};

constexpr double below_one = 1 - 1e-12;

void check_optimizer(const OptimizerConfig& o, Problems& problems) {
  const std::string path = "optimizer.params.";
  problems.finite(path + "lr", o.learning_rate, 0);
  problems.finite(path + "betas[0]", o.betas[0], 0, below_one);
  problems.finite(path + "betas[1]", o.betas[1], 0, below_one);
  problems.finite(path + "eps", o.epsilon, 0);
  problems.finite(path + "weight_decay", o.weight_decay, 0);
  problems.finite(path + "momentum", o.momentum, 0, below_one);
  problems.finite(path + "dampening", o.dampening, 0, 1);
  if (o.nesterov && (o.momentum == 0 || o.dampening != 0)) {
    problems.add(path + "nesterov", "a momentum and no dampening beside it",
                 "momentum " + text_of(o.momentum) + ", dampening " + text_of(o.dampening));
  }
  problems.finite(path + "min_coeff", o.min_coefficient, 0);
  problems.finite(path + "max_coeff", o.max_coefficient, 0);
  problems.require(!(o.min_coefficient > o.max_coefficient), path + "min_coeff",
                   "at most max_coeff, " + text_of(o.max_coefficient), text_of(o.min_coefficient));
  if (o.ema_decay) problems.finite("mics.ema_decay", *o.ema_decay, 0, below_one);
}

void check_warmup(const ScheduleConfig& s, Problems& problems) {
  const std::string path = "scheduler.params.";
  if (s.kind == ScheduleKind::warmup_cosine) {
    problems.finite(path + "warmup_min_ratio", s.warmup_min_ratio, 0, 1);
    problems.finite(path + "cos_min_ratio", s.cos_min_ratio, 0, 1);
  } else {
    problems.finite(path + "warmup_min_lr", s.warmup_min_lr, 0);
    problems.finite(path + "warmup_max_lr", s.warmup_max_lr, 0);
    problems.require(!(s.warmup_min_lr > s.warmup_max_lr), path + "warmup_min_lr",
                     "at most warmup_max_lr, " + text_of(s.warmup_max_lr),
                     text_of(s.warmup_min_lr));
  }
  problems.at_least(path + "warmup_num_steps", s.warmup_num_steps, 0);
  if (s.kind != ScheduleKind::warmup) {
    problems.at_least(path + "total_num_steps", s.total_num_steps, 1);
  }
}

void check_schedule(const ScheduleConfig& s, Problems& problems) {
  const std::string path = "scheduler.params.";
  switch (s.kind) {
    case ScheduleKind::constant:
      return;
    case ScheduleKind::warmup:
    case ScheduleKind::warmup_decay:
    case ScheduleKind::warmup_cosine:
      check_warmup(s, problems);
      return;
    case ScheduleKind::lr_range_test:
      problems.positive(path + "lr_range_test_min_lr", s.range_min_lr);
      problems.at_least(path + "lr_range_test_step_size", s.range_step_size, 1);
      problems.finite(path + "lr_range_test_step_rate", s.range_step_rate, 0);
      return;
    case ScheduleKind::one_cycle:
      break;
  }
  problems.finite(path + "cycle_min_lr", s.cycle_min_lr, 0);
  problems.finite(path + "cycle_max_lr", s.cycle_max_lr, 0);
  problems.require(!(s.cycle_min_lr > s.cycle_max_lr), path + "cycle_min_lr",
                   "at most cycle_max_lr, " + text_of(s.cycle_max_lr), text_of(s.cycle_min_lr));
  problems.finite(path + "decay_lr_rate", s.decay_lr_rate, 0);
  problems.at_least(path + "cycle_first_step_size", s.cycle_first_step_size, 1);
  problems.at_least(path + "cycle_second_step_size", s.cycle_second_step_size, 0);
  problems.at_least(path + "cycle_first_stair_count", s.cycle_first_stair_count, 0);
  problems.at_least(path + "cycle_second_stair_count", s.cycle_second_stair_count, -1);
  problems.at_least(path + "decay_step_size", s.decay_step_size, 0);
  problems.finite(path + "cycle_min_mom", s.cycle_min_mom, 0, below_one);
  problems.finite(path + "cycle_max_mom", s.cycle_max_mom, 0, below_one);
  problems.require(!(s.cycle_min_mom > s.cycle_max_mom), path + "cycle_min_mom",
                   "at most cycle_max_mom, " + text_of(s.cycle_max_mom), text_of(s.cycle_min_mom));
  problems.finite(path + "decay_mom_rate", s.decay_mom_rate, 0);
}

void check_loss_scale(const LossScaleConfig& s, Problems& problems) {
  constexpr double largest = 0x1p127;  // of an fp32 scalar
  problems.positive(s.dynamic ? "fp16.initial_scale_power" : "fp16.loss_scale", s.initial);
  problems.require(!(s.initial > largest), "fp16.loss_scale", "at most 2^127", text_of(s.initial));
  if (!s.dynamic) return;
  problems.require(std::isfinite(s.factor) && s.factor > 1, "loss_scale.factor",
                   "a finite number of more than 1", text_of(s.factor));
  problems.at_least("fp16.loss_scale_window", s.window, 1);
  problems.at_least("fp16.hysteresis", s.hysteresis, 1);
  problems.positive("fp16.min_loss_scale", s.minimum);
  problems.require(!(s.minimum > s.initial), "fp16.min_loss_scale",
                   "at most the scale at the start, " + text_of(s.initial), text_of(s.minimum));
}

void check_dtypes(const Config& config, Problems& problems) {
  const auto text = [](DType dtype) { return std::string(name(dtype)); };
  const DType master = config.master_for(config.compute);
  const bool is_fp64 = config.compute == DType::fp64;
  if (bytes_of(master) < 4) {
    problems.add("mics.master_dtype", "fp32 or fp64", text(master));
  } else if (is_fp64 && master != DType::fp64) {
    problems.add("mics.master_dtype", "fp64 for fp64 parameters", text(master));
  }
  const DType accumulate = config.accumulate_for(config.compute);
  problems.require(!is_fp64 || accumulate == DType::fp64, "data_types.grad_accum_dtype",
                   "fp64 for fp64 parameters", text(accumulate));
}

// What no number of ranks can solve; the rest is Config::solve_batch's.
void check_batch(const Config& config, Problems& problems) {
  if (config.train_batch_size) problems.at_least("train_batch_size", *config.train_batch_size, 1);
  if (config.micro_batch_size) {
    problems.at_least("train_micro_batch_size_per_gpu", *config.micro_batch_size, 1, INT32_MAX);
  }
  if (config.accumulation_steps) {
    problems.at_least("gradient_accumulation_steps", *config.accumulation_steps, 1, INT32_MAX);
  }
  const std::int64_t all = config.train_batch_size.value_or(0);
  const std::int64_t micro = config.micro_batch_size.value_or(0);
  const std::int64_t steps = config.accumulation_steps.value_or(1);
  if (all < 1 || steps < 1) return;
  if (micro >= 1) {
    const std::string each =
        std::to_string(micro) + " a micro-step" +
        (config.accumulation_steps ? " x " + std::to_string(steps) + " micro-steps"
                                   : std::string());
    // Both factors fit 31 bits unless that is a problem of its own.
    const bool divides = micro <= INT32_MAX && steps <= INT32_MAX && all % (micro * steps) == 0;
    problems.require(divides, "train_batch_size", "a multiple of " + each, std::to_string(all),
                     config.accumulation_steps
                         ? "leave one of the three out"
                         : "leave train_micro_batch_size_per_gpu out: any number can be shared");
  } else {
    problems.require(steps <= all, "gradient_accumulation_steps",
                     "at most the " + std::to_string(all) + " samples", std::to_string(steps));
  }
}

std::vector<Problem> find_problems(const Config& config) {
  Problems problems;
  check_optimizer(config.optimizer, problems);
  check_schedule(config.schedule, problems);
  check_loss_scale(config.loss_scale, problems);
  check_dtypes(config, problems);
  problems.finite("gradient_clipping", config.gradient_clipping, 0);
  problems.positive("gradient_predivide_factor", config.gradient_predivide_factor);
  problems.finite("mics.timeout", config.timeout, 1e-3, 1e9);
  problems.at_least("mics.replica_check_every", config.replica_check_every, 0);
  problems.at_least("mics.slots", config.slots, 1);
  if (config.prefetch) problems.at_least("mics.prefetch", *config.prefetch, 0);
  if (config.ranks_per_node) problems.at_least("mics.ranks_per_node", *config.ranks_per_node, 1);
  if (config.memory_budget) problems.at_least("mics.memory_budget", *config.memory_budget, 1);
  if (config.preset == Preset::mics) {
    problems.require(config.shard_size >= 1 || config.shard_size == Config::one_node,
                     "mics.shard_size", "1 or more ranks, or \"node\", for the preset mics",
                     std::to_string(config.shard_size),
                     "give mics.shard_size or zero_optimization.mics_shard_size");
  }
  problems.at_least("zero_optimization.stage3_param_persistence_threshold",
                    config.persistence_threshold, 0);
  problems.at_least("zero_optimization.stage3_model_persistence_threshold",
                    config.persistence_model_threshold, 0);
  check_batch(config, problems);
  return problems.take();
}

}  // namespace

std::string_view name(Preset preset) {
  switch (preset) {
    case Preset::ddp:
      return "ddp";
    case Preset::zero2:
      return "zero2";
    case Preset::zero3:
      return "zero3";
    case Preset::mics:
      return "mics";
  }
  return "?";
}

Config Config::parse(std::string_view text, std::string_view source) {
  return read(JsonReader::parse(text, source));
}

Config Config::read(JsonReader json) { return read(std::move(json), {}); }

Config Config::read(JsonReader json, const DeckValues& deck) {
  detail::ReadConfig result = detail::read_config(std::move(json), deck);
  if (!result.refusals.empty()) {
    const std::size_t others = result.refusals.size() - 1;
    throw ConfigError(result.refusals.front() +
                      (others == 0 ? "" : "; and " + std::to_string(others) + " more refused"));
  }
  result.config.validate();
  return std::move(result.config);
}

Config Config::explain(JsonReader json, const DeckValues& deck) {
  return detail::read_config(std::move(json), deck).config;
}

std::vector<KeyNote> Config::problems() const {
  std::vector<KeyNote> notes;
  for (const Problem& problem : find_problems(*this)) {
    std::string text = "expected " + problem.expected + ", found " + problem.found;
    if (!problem.remedy.empty()) text += "; " + problem.remedy;
    notes.push_back({problem.key, problem.found, KeyFate::refused, text});
  }
  return notes;
}

void Config::validate() const {
  for (const Problem& problem : find_problems(*this)) {
    refuse(source + problem.key, problem.expected, problem.found, problem.remedy);
  }
}

Batch Config::solve_batch(int world_size) const {
  validate();
  const std::string key = source + "train_batch_size";
  if (!train_batch_size && !micro_batch_size) {
    refuse(key, "train_batch_size or train_micro_batch_size_per_gpu",
           accumulation_steps ? "gradient_accumulation_steps alone" : "neither");
  }
  Batch batch;
  if (!micro_batch_size) {
    batch.global = *train_batch_size;
    batch.micro_steps = accumulation_steps.value_or(1);
    return batch;
  }
  const std::int64_t micro = *micro_batch_size;
  batch.micro_steps = accumulation_steps
                          ? *accumulation_steps
                          : train_batch_size.value_or(micro * world_size) / (micro * world_size);
  constexpr std::int64_t most = INT64_MAX / 4;
  if (batch.micro_steps > most / (micro * world_size)) {
    refuse(source + "gradient_accumulation_steps",
           "at most " + std::to_string(most / (micro * world_size)) + " for this micro batch",
           std::to_string(batch.micro_steps));
  }
  batch.global = micro * batch.micro_steps * world_size;
  if (train_batch_size && batch.global != *train_batch_size) {
    const std::string ranks = std::to_string(world_size) + " ranks";
    if (!accumulation_steps) {
      refuse(key, "a multiple of " + std::to_string(micro) + " a micro-step x " + ranks,
             std::to_string(*train_batch_size),
             "leave train_micro_batch_size_per_gpu out: any number can be shared");
    }
    refuse(key,
           std::to_string(micro) + " a micro-step x " + std::to_string(batch.micro_steps) +
               " micro-steps x " + ranks + " = " + std::to_string(batch.global),
           std::to_string(*train_batch_size), "leave one of the three out");
  }
  return batch;
}

int Config::shard_size_for(std::span<const int> node_of_rank) const {
  const auto ranks = static_cast<int>(node_of_rank.size());
  switch (preset) {
    case Preset::ddp:
      return 1;
    case Preset::zero2:
    case Preset::zero3:
      return ranks;
    case Preset::mics:
      break;
  }
  if (shard_size != one_node) return shard_size;
  std::map<int, int> population;
  for (const int node : node_of_rank) ++population[node];
  int size = ranks;
  for (const auto& [node, members] : population) size = std::min(size, members);
  while (ranks % size != 0) --size;
  return size;
}

DType Config::master_for(DType compute_dtype) const {
  if (master) return *master;
  return compute_dtype == DType::fp64 ? DType::fp64 : DType::fp32;
}

DType Config::accumulate_for(DType compute_dtype) const {
  if (accumulate) return *accumulate;
  return compute_dtype == DType::fp64 ? DType::fp64 : DType::fp32;
}

PlanRequest Config::plan_request(int world_size) const {
  PlanRequest request;
  request.preset = name(preset);
  request.compute = compute;
  request.master = master_for(compute);
  request.gradient = gradient;
  request.wire = wire;
  request.accumulate = accumulate;
  request.predivide = prescale_gradients ? world_size : gradient_predivide_factor;
  const auto rule = custom_optimizer != nullptr
                        ? custom_optimizer
                        : std::shared_ptr<const optim::Optimizer>(optim::make_optimizer(optimizer));
  request.optimizer = rule->name();
  request.states = static_cast<int>(rule->states().size());
  request.norms_per_tensor = rule->norms_per_tensor();
  request.forward_only = forward_only;
  request.keep_gathered = preset == Preset::zero2;
  request.want_two_stage = two_stage != Switch::off;
  request.require_two_stage = two_stage == Switch::on;
  request.slots = slots;
  request.prefetch = std::min(prefetch.value_or(slots - 1), slots - 1);
  request.debug = debug;
  request.micro_steps = static_cast<int>(accumulation_steps.value_or(1));
  request.sums = device_sums;
  request.step_bytes = optim::DeviceStep::bytes;
  request.persistence = {persistence_threshold, persistence_model_threshold};
  return request;
}

std::string Config::describe() const {
  // Hexadecimal floats: two configurations that differ in the last bit differ here.
  const auto exact = [](double value) {
    std::array<char, 40> text{};
    std::snprintf(text.data(), text.size(), "%a", value);
    return std::string(text.data());
  };
  const auto optional = [](const auto& value) {
    return value ? std::to_string(static_cast<std::int64_t>(*value)) : std::string("none");
  };
  std::string text;
  const auto line = [&](const char* key, const std::string& value) {
    text += std::string(key) + '=' + value + '\n';
  };
  line("preset", std::string(name(preset)));
  line("shard_size", std::to_string(shard_size));
  line("forward_only", std::to_string(static_cast<int>(forward_only)));
  line("two_stage", std::to_string(static_cast<int>(two_stage)));
  line("ranks_per_node", optional(ranks_per_node));
  line("persistence_threshold", std::to_string(persistence_threshold));
  line("persistence_model_threshold", std::to_string(persistence_model_threshold));
  const auto dtype = [](const std::optional<DType>& value) {
    return value ? std::string(mics::name(*value)) : std::string("none");
  };
  const auto integer = [](auto value) { return std::to_string(static_cast<std::int64_t>(value)); };
  line("compute", std::string(mics::name(compute)));
  line("master", std::string(mics::name(master_for(compute))));
  line("gradient", dtype(gradient));
  line("wire", dtype(wire));
  line("accumulate", dtype(accumulate));
  const OptimizerConfig& o = optimizer;
  line("optimizer", custom_optimizer != nullptr ? custom_optimizer->describe() : integer(o.kind));
  line("lr", exact(o.learning_rate));
  line("betas", exact(o.betas[0]) + ' ' + exact(o.betas[1]));
  line("eps", exact(o.epsilon));
  line("weight_decay", exact(o.weight_decay));
  line("bias_correction", integer(o.bias_correction));
  line("momentum", exact(o.momentum));
  line("dampening", exact(o.dampening));
  line("nesterov", integer(o.nesterov));
  line("max_coefficient", exact(o.max_coefficient));
  line("min_coefficient", exact(o.min_coefficient));
  line("ema_decay", o.ema_decay ? exact(*o.ema_decay) : "none");
  const ScheduleConfig& s = schedule;
  line("schedule", integer(s.kind));
  line("warmup", exact(s.warmup_min_lr) + ' ' + exact(s.warmup_max_lr) + ' ' +
                     integer(s.warmup_num_steps) + ' ' + integer(s.warmup_type) + ' ' +
                     integer(s.total_num_steps) + ' ' + exact(s.warmup_min_ratio) + ' ' +
                     exact(s.cos_min_ratio));
  line("range", exact(s.range_min_lr) + ' ' + integer(s.range_step_size) + ' ' +
                    exact(s.range_step_rate) + ' ' + integer(s.range_staircase));
  line("cycle", exact(s.cycle_min_lr) + ' ' + exact(s.cycle_max_lr) + ' ' + exact(s.decay_lr_rate) +
                    ' ' + integer(s.cycle_first_step_size) + ' ' +
                    integer(s.cycle_second_step_size) + ' ' + integer(s.cycle_first_stair_count) +
                    ' ' + integer(s.cycle_second_stair_count) + ' ' + integer(s.decay_step_size));
  line("cycle_momentum", integer(s.cycle_momentum) + ' ' + exact(s.cycle_min_mom) + ' ' +
                             exact(s.cycle_max_mom) + ' ' + exact(s.decay_mom_rate));
  line("loss_scale", integer(loss_scale.dynamic) + ' ' + exact(loss_scale.initial) + ' ' +
                         exact(loss_scale.factor) + ' ' + integer(loss_scale.window) + ' ' +
                         integer(loss_scale.hysteresis) + ' ' +
                         integer(loss_scale.consecutive_hysteresis) + ' ' +
                         exact(loss_scale.minimum));
  line("gradient_clipping", exact(gradient_clipping));
  line("gradient_predivide_factor", exact(gradient_predivide_factor));
  line("prescale_gradients", integer(prescale_gradients));
  line("replica_check", integer(replica_check_every) + ' ' + integer(replica_action));
  line("memory", optional(memory) + ' ' + integer(nccl) + ' ' + integer(share_device) + ' ' +
                     integer(device_sums));
  line("seed", std::to_string(seed));
  line("slots", std::to_string(slots));
  line("prefetch", optional(prefetch));
  line("memory_budget", optional(memory_budget));
  line("timeout", exact(timeout));
  line("debug", std::to_string(static_cast<int>(debug)));
  line("train_batch_size", optional(train_batch_size));
  line("micro_batch_size", optional(micro_batch_size));
  line("accumulation_steps", optional(accumulation_steps));
  return text;
}

}  // namespace mics
