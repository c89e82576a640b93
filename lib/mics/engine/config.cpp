// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/engine/config.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <source_location>
#include <utility>

namespace mics {
namespace {

[[noreturn]] void refuse(const std::string& object, const std::string& expected,
                         const std::string& found, const std::string& remedy = {},
                         std::source_location where = std::source_location::current()) {
  raise<ConfigError>({.object = object, .expected = expected, .found = found, .remedy = remedy},
                     where);
}

// A key that asks for something that this version does not do.
[[noreturn]] void unsupported(const std::string& object, const std::string& found,
                              const std::string& supported,
                              std::source_location where = std::source_location::current()) {
  refuse(object, supported, found, "this version of mics does nothing else", where);
}

Preset parse_preset(const std::string& word, const std::string& object) {
  for (const Preset preset : {Preset::ddp, Preset::zero2, Preset::zero3, Preset::mics}) {
    if (name(preset) == word) return preset;
  }
  refuse(object, "ddp, zero2, zero3 or mics", in_quotes(word));
}

Switch parse_switch(const std::string& word, const std::string& object) {
  if (word == "auto") return Switch::automatic;
  if (word == "on") return Switch::on;
  if (word == "off") return Switch::off;
  refuse(object, "auto, on or off", in_quotes(word));
}

// "auto" stands for a value that the deck knows; without one the default holds.
std::optional<std::int64_t> positive(JsonReader& json, const std::string& key) {
  if (!json.has(key) || json.is_auto(key)) return {};
  return json.integer(key, {}, 1);
}

double number_or_auto(JsonReader& json, const std::string& key, double fallback) {
  return json.is_auto(key) ? fallback : json.number(key, fallback);
}

void read_optimizer(JsonReader json, OptimizerConfig& optimizer) {
  const std::string type = json.text("type", "AdamW");
  JsonReader params = json.object("params");
  optimizer.learning_rate = number_or_auto(params, "lr", optimizer.learning_rate);
  optimizer.weight_decay = number_or_auto(params, "weight_decay", optimizer.weight_decay);
  if (type == "AdamW" || type == "Adam") {
    optimizer.kind = OptimizerKind::adamw;
    // DeepSpeed's "Adam" decays weights as AdamW does unless told otherwise.
    if (!params.boolean("adam_w_mode", true)) {
      unsupported(params.where("adam_w_mode"), "false", "true (decoupled weight decay)");
    }
    if (!params.boolean("bias_correction", true)) {
      unsupported(params.where("bias_correction"), "false", "true");
    }
    if (!params.is_auto("betas") && params.has("betas")) {
      const std::vector<double> betas = params.numbers("betas");
      if (betas.size() != 2) {
        refuse(params.where("betas"), "two numbers", std::to_string(betas.size()));
      }
      optimizer.betas = {betas[0], betas[1]};
    }
    optimizer.epsilon = number_or_auto(params, "eps", optimizer.epsilon);
  } else if (type == "SGD") {
    optimizer.kind = OptimizerKind::sgd;
    for (const char* key : {"momentum", "dampening"}) {
      if (params.number(key, 0.0) != 0) {
        unsupported(params.where(key), std::to_string(params.number(key)), "0");
      }
    }
    if (params.boolean("nesterov", false)) unsupported(params.where("nesterov"), "true", "false");
  } else {
    unsupported(json.where("type"), in_quotes(type), "\"AdamW\", \"Adam\" or \"SGD\"");
  }
  params.finish();
  json.finish();
}

void read_zero(JsonReader json, Config& config) {
  const std::int64_t stage = json.integer("stage", 0, 0, 3);
  const std::int64_t shard_size = json.integer("mics_shard_size", -1);
  if (shard_size == 0 || shard_size < -1) {
    refuse(json.where("mics_shard_size"), "1 or more ranks, or -1 for all",
           std::to_string(shard_size));
  }
  if (stage == 0) config.preset = Preset::ddp;
  if (stage == 1) unsupported(json.where("stage"), "1", "0, 2 or 3");
  if (stage == 2) config.preset = Preset::zero2;
  if (stage == 3) config.preset = shard_size > 0 ? Preset::mics : Preset::zero3;
  if (shard_size > 0) {
    if (stage != 3) {
      refuse(json.where("mics_shard_size"), "stage 3", "stage " + std::to_string(stage));
    }
    if (shard_size > INT32_MAX) {
      refuse(json.where("mics_shard_size"), "at most 2147483647", std::to_string(shard_size));
    }
    config.shard_size = static_cast<int>(shard_size);
  }
  if (json.has("mics_hierarchical_params_gather")) {
    // Without it the library decides; DeepSpeed's false is the default of a key that is seldom set.
    if (json.boolean("mics_hierarchical_params_gather")) config.two_stage = Switch::on;
  }
  if (!json.is_auto("stage3_param_persistence_threshold")) {
    config.persistence_threshold =
        json.integer("stage3_param_persistence_threshold", config.persistence_threshold, 0);
  }
  if (!json.is_auto("stage3_model_persistence_threshold")) {
    config.persistence_model_threshold =
        json.integer("stage3_model_persistence_threshold", config.persistence_model_threshold, 0);
  }
  for (const char* key : {"offload_optimizer", "offload_param"}) {
    if (!json.has(key)) continue;
    JsonReader offload = json.object(key);
    const std::string device = offload.text("device", "none");
    if (device != "none") unsupported(offload.where("device"), in_quotes(device), "\"none\"");
  }
  // Buffer sizes and switches of DeepSpeed's own machinery: one flat buffer a unit and a recorded
  // schedule stand in their place, and no number changes.
  for (const char* key :
       {"overlap_comm", "contiguous_gradients", "reduce_scatter", "reduce_bucket_size",
        "allgather_partitions", "allgather_bucket_size", "round_robin_gradients",
        "stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance",
        "sub_group_size"}) {
    if (json.has(key)) config.without_effect.push_back(json.where(key));
  }
  json.finish();
}

void read_own(JsonReader json, Config& config) {
  if (json.has("preset")) {
    config.preset = parse_preset(json.text("preset"), json.where("preset"));
  }
  if (json.has("shard_size")) {
    config.shard_size = static_cast<int>(json.integer("shard_size", {}, 1, INT32_MAX));
    if (config.preset != Preset::mics) {
      refuse(json.where("shard_size"), "preset mics beside it",
             "preset " + std::string(name(config.preset)));
    }
  }
  if (json.has("compute_dtype")) {
    config.compute = parse_dtype(json.text("compute_dtype"), json.where("compute_dtype"));
  }
  if (json.has("master_dtype")) {
    config.master = parse_dtype(json.text("master_dtype"), json.where("master_dtype"));
  }
  if (json.has("two_stage")) {
    config.two_stage = parse_switch(json.text("two_stage"), json.where("two_stage"));
  }
  if (json.has("ranks_per_node")) {
    config.ranks_per_node = static_cast<int>(json.integer("ranks_per_node", {}, 1, INT32_MAX));
  }
  if (json.has("prefetch")) {
    config.prefetch = static_cast<int>(json.integer("prefetch", {}, 0, 1024));
  }
  if (json.has("memory_budget")) config.memory_budget = json.integer("memory_budget", {}, 1);
  config.slots = static_cast<int>(json.integer("slots", config.slots, 1, 1024));
  config.seed =
      static_cast<std::uint64_t>(json.integer("seed", static_cast<std::int64_t>(config.seed), 0));
  config.timeout = json.number("timeout", config.timeout);
  config.debug = json.boolean("debug", config.debug);
  json.finish();
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

Config Config::read(JsonReader json) {
  Config config;
  config.train_batch_size = positive(json, "train_batch_size");
  config.micro_batch_size = positive(json, "train_micro_batch_size_per_gpu");
  config.accumulation_steps = positive(json, "gradient_accumulation_steps");
  config.gradient_clipping = number_or_auto(json, "gradient_clipping", config.gradient_clipping);
  if (json.has("optimizer")) read_optimizer(json.object("optimizer"), config.optimizer);

  JsonReader bf16 = json.object("bf16");
  JsonReader fp16 = json.object("fp16");
  if (bf16.boolean("enabled", false)) config.compute = DType::bf16;
  if (fp16.boolean("enabled", false)) {
    unsupported(fp16.where("enabled"), "true", "false (bf16, fp32 or fp64 compute)");
  }
  bf16.finish();

  if (json.has("zero_optimization")) read_zero(json.object("zero_optimization"), config);
  if (json.has("mics")) read_own(json.object("mics"), config);

  // Keys that would change the numbers are refused until they do.
  if (json.has("communication_data_type") && !json.is_auto("communication_data_type")) {
    const std::string key = json.where("communication_data_type");
    if (parse_dtype(json.text("communication_data_type"), key) != config.compute) {
      unsupported(key, in_quotes(json.text("communication_data_type")),
                  "the compute dtype, " + std::string(mics::name(config.compute)));
    }
  }
  JsonReader data_types = json.object("data_types");
  if (data_types.has("grad_accum_dtype")) {
    const std::string key = data_types.where("grad_accum_dtype");
    const DType wanted = config.compute == DType::fp64 ? DType::fp64 : DType::fp32;
    if (parse_dtype(data_types.text("grad_accum_dtype"), key) != wanted) {
      unsupported(key, in_quotes(data_types.text("grad_accum_dtype")),
                  std::string(mics::name(wanted)));
    }
  }
  data_types.finish();
  if (json.boolean("prescale_gradients", false)) {
    unsupported(json.where("prescale_gradients"), "true", "false");
  }
  if (json.number("gradient_predivide_factor", 1.0) != 1) {
    unsupported(json.where("gradient_predivide_factor"),
                std::to_string(json.number("gradient_predivide_factor")), "1");
  }
  if (json.has("scheduler")) {
    unsupported(json.where("scheduler"), "a schedule",
                "none (the application sets learning rates)");
  }
  for (const char* key : {"steps_per_print", "wall_clock_breakdown",
                          "zero_allow_untested_optimizer", "memory_breakdown", "dump_state"}) {
    if (json.has(key)) config.without_effect.push_back(json.where(key));
  }
  json.finish();
  config.validate();
  return config;
}

void Config::validate() const {
  const auto finite = [](const char* key, double value, double lowest, double highest) {
    if (std::isfinite(value) && value >= lowest && value <= highest) return;
    std::string range = "a finite number of at least " + std::to_string(lowest);
    if (std::isfinite(highest)) range += " and at most " + std::to_string(highest);
    refuse(key, range, std::to_string(value));
  };
  constexpr double any = std::numeric_limits<double>::infinity();
  finite("optimizer.params.lr", optimizer.learning_rate, 0, any);
  finite("optimizer.params.betas[0]", optimizer.betas[0], 0, 1 - 1e-12);
  finite("optimizer.params.betas[1]", optimizer.betas[1], 0, 1 - 1e-12);
  finite("optimizer.params.eps", optimizer.epsilon, 0, any);
  finite("optimizer.params.weight_decay", optimizer.weight_decay, 0, any);
  finite("gradient_clipping", gradient_clipping, 0, any);
  finite("mics.timeout", timeout, 1e-3, 1e9);
  if (slots < 1) refuse("mics.slots", "1 or more", std::to_string(slots));
  if (prefetch && *prefetch < 0) refuse("mics.prefetch", "0 or more", std::to_string(*prefetch));
  if (ranks_per_node && *ranks_per_node < 1) {
    refuse("mics.ranks_per_node", "1 or more", std::to_string(*ranks_per_node));
  }
  if (persistence_threshold < 0 || persistence_model_threshold < 0) {
    refuse("stage3_param_persistence_threshold", "0 or more elements", "a negative number");
  }
  if (compute == DType::fp16) {
    unsupported("mics.compute_dtype", "fp16", "bf16, fp32 or fp64");
  }
  const DType master_dtype = master_for(compute);
  if (bytes_of(master_dtype) < 4) {
    refuse("mics.master_dtype", "fp32 or fp64", std::string(mics::name(master_dtype)));
  }
  if (compute == DType::fp64 && master_dtype != DType::fp64) {
    refuse("mics.master_dtype", "fp64 for fp64 parameters", std::string(mics::name(master_dtype)));
  }
}

int Config::shard_size_for(int world_size) const {
  switch (preset) {
    case Preset::ddp:
      return 1;
    case Preset::zero2:
    case Preset::zero3:
      return world_size;
    case Preset::mics:
      break;
  }
  return shard_size;
}

DType Config::master_for(DType compute_dtype) const {
  if (master) return *master;
  return compute_dtype == DType::fp64 ? DType::fp64 : DType::fp32;
}

PlanRequest Config::plan_request() const {
  PlanRequest request;
  request.preset = name(preset);
  request.compute = compute;
  request.master = master_for(compute);
  request.states = optimizer.kind == OptimizerKind::adamw ? 2 : 0;
  request.optimizer = optimizer.kind == OptimizerKind::adamw ? "AdamW" : "SGD";
  request.keep_gathered = preset == Preset::zero2;
  request.want_two_stage = two_stage != Switch::off;
  request.require_two_stage = two_stage == Switch::on;
  request.slots = slots;
  request.prefetch = std::min(prefetch.value_or(slots - 1), slots - 1);
  request.debug = debug;
  request.micro_steps = static_cast<int>(accumulation_steps.value_or(1));
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
  line("two_stage", std::to_string(static_cast<int>(two_stage)));
  line("ranks_per_node", optional(ranks_per_node));
  line("persistence_threshold", std::to_string(persistence_threshold));
  line("persistence_model_threshold", std::to_string(persistence_model_threshold));
  line("compute", std::string(mics::name(compute)));
  line("master", std::string(mics::name(master_for(compute))));
  line("optimizer", std::to_string(static_cast<int>(optimizer.kind)));
  line("lr", exact(optimizer.learning_rate));
  line("betas", exact(optimizer.betas[0]) + ' ' + exact(optimizer.betas[1]));
  line("eps", exact(optimizer.epsilon));
  line("weight_decay", exact(optimizer.weight_decay));
  line("gradient_clipping", exact(gradient_clipping));
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
