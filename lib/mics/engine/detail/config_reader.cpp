// SPDX-License-Identifier: Apache-2.0
#include <mics/engine/detail/config_section.hpp>

#include <cmath>

namespace mics::detail {
namespace {

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

constexpr std::int64_t most_samples = INT32_MAX;  // a plan counts micro-steps in an int

void read_batch(Section& root, Config& config, const Deck& deck) {
  const auto size = [&](const std::string& key, std::optional<std::int64_t> Config::*field,
                        std::int64_t highest, const std::string& meaning) {
    root.honour(key, [&]() -> std::string {
      if (!root.json().is_auto(key)) {
        config.*field = root.json().integer(key, {}, 1, highest);
        return meaning;
      }
      const auto value = deck.of(key, [field](const Config& c) { return *(c.*field); });
      if (!value) return meaning + ": derived from the other sizes";
      config.*field = *value;
      return meaning + ": " + text_of(*value) + ", the deck's";
    });
  };
  size("train_batch_size", &Config::train_batch_size, INT64_MAX, "samples of a step");
  size("train_micro_batch_size_per_gpu", &Config::micro_batch_size, most_samples,
       "samples of a rank in a micro-step");
  size("gradient_accumulation_steps", &Config::accumulation_steps, most_samples,
       "micro-steps of a step");
}

// 16-bit floats with a scaled loss.
bool read_fp16(Section& fp16, Config& config, const Deck& deck) {
  JsonReader& json = fp16.json();
  bool enabled = false;
  fp16.boolean("enabled", enabled, "compute dtype fp16",
               deck.values().engine ? std::optional(deck.values().engine->compute == DType::fp16)
                                    : std::nullopt);
  fp16.must_be_off("fp16_master_weights_and_grads", "master weights are fp32 or fp64; remove it");
  static constexpr std::array<Idle, 1> idle{
      {{"auto_cast", "the application passes its inputs in the dtype that its kernels read"}}};
  fp16.without_effect(idle);
  if (!enabled) {
    for (const char* key : {"loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis",
                            "consecutive_hysteresis", "min_loss_scale"}) {
      fp16.without_effect(key, "fp16 is not enabled");
    }
    return false;
  }
  LossScaleConfig& scale = config.loss_scale;
  double fixed = 0;
  fp16.honour("loss_scale", [&]() -> std::string {
    if (!json.is_auto("loss_scale")) fixed = json.number("loss_scale");
    if (fixed < 0) {
      const std::string found = text_of(std::exchange(fixed, 0));
      refuse(fp16.where("loss_scale"), "0 (dynamic) or a positive number", found);
    }
    return fixed == 0 ? "dynamic" : "static";
  });
  scale.dynamic = fixed == 0;
  if (!scale.dynamic) {
    scale.initial = fixed;
    for (const char* key : {"initial_scale_power", "loss_scale_window", "hysteresis",
                            "consecutive_hysteresis", "min_loss_scale"}) {
      fp16.without_effect(key, "the scale is static");
    }
    return true;
  }
  std::int64_t power = 16;
  fp16.integer("initial_scale_power", power, "2 to this power at the start", 0, 127);
  scale.initial = std::ldexp(1.0, static_cast<int>(power));
  fp16.integer("loss_scale_window", scale.window, "steps before the scale grows", 1, INT64_MAX);
  fp16.integer("hysteresis", scale.hysteresis, "overflows before the scale falls", 1, INT64_MAX);
  fp16.boolean("consecutive_hysteresis", scale.consecutive_hysteresis,
               "a good step refills the hysteresis");
  fp16.number("min_loss_scale", scale.minimum, "smallest scale");
  return true;
}

bool read_bf16(Section& bf16, const Deck& deck) {
  bool enabled = false;
  bf16.boolean("enabled", enabled, "compute dtype bf16",
               deck.values().engine ? std::optional(deck.values().engine->compute == DType::bf16)
                                    : std::nullopt);
  bf16.must_be_off("bf16_master_weights_and_grads", "master weights are fp32 or fp64; remove it");
  bf16.must_be_off("bf16_optimizer_states", "states have the dtype of the master; remove it");
  static constexpr std::array<Idle, 3> idle{
      {{"immediate_grad_update", "gradients are accumulated where they are reduced"},
       {"check_grad_overflow", "a step with a gradient that is not finite is always skipped"},
       {"auto_cast", "the application passes its inputs in the dtype that its kernels read"}}};
  bf16.without_effect(idle);
  return enabled;
}

void read_own(Section& own, Config& config) {
  JsonReader& json = own.json();
  own.honour("preset", [&]() -> std::string {
    config.preset = parse_preset(json.text("preset"), own.where("preset"));
    return "where state lives, whatever the stage says";
  });
  own.honour("shard_size", [&]() -> std::string {
    const bool node = json.shown("shard_size") == "\"node\"";
    if (node) static_cast<void>(json.text("shard_size"));
    const int size =
        node ? Config::one_node : static_cast<int>(json.integer("shard_size", {}, 1, INT32_MAX));
    if (config.preset != Preset::mics) {
      refuse(own.where("shard_size"), "preset mics beside it",
             "preset " + std::string(name(config.preset)));
    }
    config.shard_size = size;
    return node ? "the ranks of a node share one copy of the state"
                : "ranks that share one copy of the state";
  });
  own.boolean("forward_only", config.forward_only,
              "weights alone: no gradients, master weights or optimizer state");
  const auto dtype = [&](const std::string& key, const std::string& meaning, auto set) {
    own.honour(key, [&]() -> std::string {
      set(parse_dtype(json.text(key), own.where(key)));
      return meaning;
    });
  };
  dtype("compute_dtype", "of parameters that name none", [&](DType d) { config.compute = d; });
  dtype("master_dtype", "of the optimizer's copy", [&](DType d) { config.master = d; });
  dtype("gradient_dtype", "of the Views that kernels add to",
        [&](DType d) { config.gradient = d; });
  own.honour("two_stage", [&]() -> std::string {
    config.two_stage = parse_switch(json.text("two_stage"), own.where("two_stage"));
    return "gathers inside and between nodes apart";
  });
  own.honour("ranks_per_node", [&]() -> std::string {
    config.ranks_per_node = static_cast<int>(json.integer("ranks_per_node", {}, 1, INT32_MAX));
    return "overrides the nodes that were found";
  });
  own.honour("prefetch", [&]() -> std::string {
    config.prefetch = static_cast<int>(json.integer("prefetch", {}, 0, 1024));
    return "gathers started ahead";
  });
  own.honour("memory_budget", [&]() -> std::string {
    config.memory_budget = json.integer("memory_budget", {}, 1);
    return "bytes a rank that the plan may not exceed";
  });
  own.honour("slots", [&]() -> std::string {
    config.slots = static_cast<int>(json.integer("slots", {}, 1, 1024));
    return "units that can be gathered, and reduced, at a time";
  });
  own.honour("seed", [&]() -> std::string {
    config.seed = static_cast<std::uint64_t>(json.integer("seed", {}, 0));
    return "of the initial values";
  });
  own.honour("ema_decay", [&]() -> std::string {
    config.optimizer.ema_decay = json.number("ema_decay");
    return "decay of the average of the weights";
  });
  own.number("timeout", config.timeout, "seconds that a rank waits for a peer");
  own.integer("replica_check_every", config.replica_check_every,
              "steps between comparisons of the replicas", 0, INT64_MAX);
  own.honour("replica_check_action", [&]() -> std::string {
    const std::string word = json.text("replica_check_action");
    if (word != "abort" && word != "repair") {
      refuse(own.where("replica_check_action"), "abort or repair", in_quotes(word.substr(0, 60)));
    }
    config.replica_action = word == "repair" ? ReplicaCheck::repair : ReplicaCheck::abort;
    return "what is done about a replica that differs";
  });
  const auto word = [&](const std::string& key, std::string_view first, std::string_view second) {
    const std::string found = json.text(key);
    if (found != first && found != second) {
      refuse(own.where(key), std::string(first) + " or " + std::string(second),
             in_quotes(found.substr(0, 60)));
    }
    return found == second;
  };
  own.honour("memory", [&]() -> std::string {
    if (json.is_auto("memory")) return "where the state lives: where the kernels compute";
    config.memory = word("memory", "host", "device") ? Memory::device : Memory::host;
    return "where the state lives";
  });
  own.honour("nccl", [&]() -> std::string {
    config.nccl = parse_switch(json.text("nccl"), own.where("nccl"));
    return "moves what lives in device memory";
  });
  own.boolean("share_device", config.share_device, "several ranks may use one device");
  own.honour("device_sums", [&]() -> std::string {
    config.device_sums =
        word("device_sums", "wire", "fp32") ? comm::DeviceSums::fp32 : comm::DeviceSums::wire;
    return "how NCCL's reductions add up";
  });
  own.boolean("debug", config.debug, "checks every collective");
}

// Element types: sections that may contradict one another.
void read_dtypes(Section& root, Config& config, const Deck& deck) {
  bool bf16 = false;
  bool fp16 = false;
  for (const char* key : {"bf16", "bfloat16"}) {
    root.section(key, [&](Section& section) { bf16 = read_bf16(section, deck) || bf16; });
  }
  root.section("fp16", [&](Section& section) { fp16 = read_fp16(section, config, deck); });
  if (bf16 && fp16) {
    root.guard("fp16.enabled", [&] {
      refuse(root.where("fp16.enabled"), "one of fp16 and bf16", "both", "disable one");
    });
  }
  if (fp16) config.compute = DType::fp16;
  if (bf16) config.compute = DType::bf16;

  const DType of_sections = config.compute;
  root.section("mics", [&](Section& own) {
    read_own(own, config);
    own.guard("compute_dtype", [&] {
      if ((bf16 || fp16) && config.compute != of_sections) {
        refuse(own.where("compute_dtype"), std::string(name(of_sections)) + ", which is enabled",
               std::string(name(config.compute)), "leave one of the two out");
      }
    });
  });
  // fp16 gradients vanish without a scale, whichever key asked for fp16.
  if (config.compute == DType::fp16 && !fp16) {
    config.loss_scale.dynamic = true;
    config.loss_scale.initial = 0x1p16;
  }

  root.honour("communication_data_type", [&]() -> std::string {
    const std::string key = "communication_data_type";
    if (root.json().is_auto(key)) {
      config.wire = deck.of(key, [](const Config& c) { return c.wire.value_or(c.compute); });
      return "gradients on the network: " +
             (config.wire ? std::string(name(*config.wire)) + ", the deck's" : "the default");
    }
    config.wire = parse_dtype(root.json().text(key), root.where(key));
    return "gradients on the network, in both hops";
  });
  root.section("data_types", [&](Section& types) {
    types.honour("grad_accum_dtype", [&]() -> std::string {
      const std::string key = "grad_accum_dtype";
      if (types.json().is_auto(key)) return "sum of the gradients: the default";
      config.accumulate = parse_dtype(types.json().text(key), types.where(key));
      return "sum of the gradients";
    });
    types.honour("param_dtype", [&]() -> std::string {
      const std::string key = "param_dtype";
      if (types.json().is_auto(key)) return "the compute dtype";
      if (parse_dtype(types.json().text(key), types.where(key)) != config.compute) {
        refuse(types.where(key), "the compute dtype, " + std::string(name(config.compute)),
               types.json().shown(key), "use bf16.enabled, fp16.enabled or mics.compute_dtype");
      }
      return "the compute dtype";
    });
    types.without_effect("buffer_dtype", "the engine holds parameters, no other tensors");
  });
}

void read_gradients(Section& root, Config& config, const Deck& deck) {
  root.number("gradient_clipping", config.gradient_clipping, "largest global norm, 0: off",
              deck.of("gradient_clipping", [](const Config& c) { return c.gradient_clipping; }));
  root.boolean("prescale_gradients", config.prescale_gradients, "divided before they are summed",
               deck.of("prescale_gradients", [](const Config& c) { return c.prescale_gradients; }));
  root.number("gradient_predivide_factor", config.gradient_predivide_factor,
              "divisor of prescale_gradients",
              deck.of("gradient_predivide_factor",
                      [](const Config& c) { return c.gradient_predivide_factor; }));
  root.honour("gradient_allreduce_op", [&]() -> std::string {
    const std::string op = lower_case(root.json().text("gradient_allreduce_op"));
    if (op != "mean" && op != "avg" && op != "auto") {
      refuse(root.where("gradient_allreduce_op"), "\"mean\"", in_quotes(op.substr(0, 60)),
             "gradients are means over the samples of a step: scale the learning rate");
    }
    return "means over the samples of a step, as ever here";
  });
  root.honour("fp32_allreduce", [&]() -> std::string {
    if (root.json().is_auto("fp32_allreduce") || !root.json().boolean("fp32_allreduce")) {
      return "off";
    }
    if (config.wire && *config.wire != DType::fp32) {
      refuse(root.where("fp32_allreduce"), "false beside communication_data_type", "true",
             "leave one of the two out");
    }
    config.wire = DType::fp32;
    return "gradients on the network in fp32";
  });
}

void read_others(Section& root) {
  // What is not there and would change the numbers.
  root.must_be_disabled("amp", "use bf16 or fp16, which keep fp32 master weights");
  root.must_be_disabled("torch_autocast", "use bf16 or fp16: dtypes are the parameters'");
  root.must_be_disabled("elasticity", "give train_batch_size: any number of ranks can share it");
  root.must_be_disabled("data_efficiency", "the application chooses its samples");
  root.must_be_disabled("curriculum_learning", "the application chooses its samples");
  root.must_be_disabled("progressive_layer_drop", "the application chooses its layers");
  root.must_be_disabled("quantize_training", "weights are not quantized");
  root.must_be_disabled("compression_training", "weights are neither quantized nor pruned");
  root.must_be_disabled("weight_quantization_config", "weights are not quantized");
  root.honour("sparse_attention", [&]() -> std::string {
    refuse(root.where("sparse_attention"), "no such section", root.json().shown("sparse_attention"),
           "the attention is the application's kernel; remove it");
  });
  for (const char* key : {"sequence_parallel_size", "autotp_size"}) {
    root.honour(key, [&]() -> std::string {
      if (!root.json().is_auto(key) && root.json().integer(key, {}, 0) > 1) {
        refuse(root.where(key), "1", root.json().shown(key), "ranks share samples, not tensors");
      }
      return "off, as ever here";
    });
  }
  root.section("tensor_parallel", [&](Section& parallel) {
    for (const char* key : {"autotp_size", "tp_size"}) {
      parallel.honour(key, [&]() -> std::string {
        if (!parallel.json().is_auto(key) && parallel.json().integer(key, {}, 0) > 1) {
          refuse(parallel.where(key), "1", parallel.json().shown(key),
                 "ranks share samples, not tensors");
        }
        return "off, as ever here";
      });
    }
    parallel.rest_without_effect("tensors are not split among ranks");
  });

  static constexpr std::string_view monitor = "the application reports: engine results, log sink";
  static constexpr std::string_view report = "the plan and the log sink say what mics does";
  static constexpr std::string_view samples = "the application makes its batches";
  static constexpr std::array<Idle, 33> idle{
      {{"steps_per_print", report},
       {"wall_clock_breakdown", report},
       {"memory_breakdown", report},
       {"dump_state", report},
       {"timers", report},
       {"comms_logger", report},
       {"flops_profiler", "kernels are the application's"},
       {"tensorboard", monitor},
       {"wandb", monitor},
       {"comet", monitor},
       {"csv_monitor", monitor},
       {"activation_checkpointing", "the application decides what it keeps and what it recomputes"},
       {"aio", "nothing is offloaded to files"},
       {"autotuning", "it runs other configurations beside training: no number of this one"},
       {"checkpoint", "DeepSpeed's files; mics has a format of its own"},
       {"nebula", "DeepSpeed's files; mics has a format of its own"},
       {"hybrid_engine", "it speeds up generation, which is the application's"},
       {"pipeline", "ranks share samples, not layers"},
       {"compile", "there is no graph to compile"},
       {"graph_harvesting", "there is no graph to compile"},
       {"eigenvalue", "it serves quantize_training alone"},
       {"use_data_before_expert_parallelism", "there are no experts"},
       {"use_data_before_expert_parallel_", "there are no experts"},
       {"seq_parallel_communication_data_type", "ranks share samples, not sequences"},
       {"zero_allow_untested_optimizer", "every optimizer that is accepted is tested"},
       {"zero_force_ds_cpu_optimizer", "nothing is offloaded"},
       {"sparse_gradients", "gradients are dense: the sums are the same"},
       {"disable_allgather", "a gather gives the same bytes"},
       {"managed_gradient_accumulation", "the application says which micro-step is the last"},
       {"dataloader_drop_last", samples},
       {"data_sampling", samples},
       {"local_rank", "the communicator is the application's"},
       {"model_parallel_size", "the communicator is the application's"}}};
  root.without_effect(idle);
}

// Defaults that hold because the configuration is silent, and that a user may expect otherwise.
void note_defaults(Config& config) {
  struct Entry {
    std::string_view key;
    std::string taken;
    std::string_view elsewhere;
  };
  const std::array<Entry, 9> entries{
      {{"gradient_clipping", "0, off", "1.0; 0.0 before 2026-06-23"},
       {"zero_optimization.overlap_comm", "no effect",
        "true at stage 3, else false; its documentation says false"},
       {"zero_optimization.stage3_prefetch_bucket_size", "no effect",
        "5e7; its documentation says 5e8"},
       {"zero_optimization.sub_group_size", "no effect", "1e9; a sample of its documentation 1e12"},
       {"zero_optimization.stage3_param_persistence_threshold", "0, parameters stay in their units",
        "1e5; the numbers are the same"},
       {"zero_optimization.stage", "3, parameters gathered when used", "0"},
       {"optimizer", "AdamW", "the one that the script constructs"},
       {"communication_data_type",
        "hop 1 " + std::string(name(config.gradient.value_or(config.compute))) + ", hop 2 " +
            std::string(name(config.accumulate_for(config.compute))),
        "the model's dtype"},
       {"data_types.grad_accum_dtype", std::string(name(config.accumulate_for(config.compute))),
        "the model's dtype"}}};
  const auto given = [&](std::string_view key) {
    const auto& keys = config.report.keys;
    return std::any_of(keys.begin(), keys.end(), [key](const KeyNote& note) {
      if (note.value == "null") return false;
      if (note.value == "\"auto\"" && note.text.ends_with(", the default")) return false;
      return note.key == key || note.key.starts_with(std::string(key) + '.');
    });
  };
  for (const Entry& entry : entries) {
    if (given(entry.key)) continue;
    // A section without a stage means stage 0, and mics.preset says it all.
    const bool is_stage = entry.key == "zero_optimization.stage";
    if (is_stage && (given("zero_optimization") || given("mics.preset"))) continue;
    config.report.defaults.push_back(
        {std::string(entry.key), entry.taken, std::string(entry.elsewhere)});
  }
}

}  // namespace

ReadConfig read_config(JsonReader json, const DeckValues& values) {
  ReadConfig result;
  Config& config = result.config;
  config.source = json.where({});
  const Deck deck(values);
  Section root(std::move(json), result);
  read_batch(root, config, deck);
  root.section("optimizer", [&](Section& section) { read_optimizer(section, config, deck); });
  root.section("scheduler", [&](Section& section) { read_schedule(section, config, deck); });
  root.section("zero_optimization", [&](Section& section) { read_zero(section, config, deck); });
  read_dtypes(root, config, deck);
  read_gradients(root, config, deck);
  read_others(root);
  root.finish();

  // Values that were read and can never work.
  for (KeyNote& problem : config.problems()) {
    auto& notes = config.report.keys;
    // A number of an array stands in the array's note.
    const std::string key = problem.key.substr(0, problem.key.find('['));
    const auto note =
        std::find_if(notes.begin(), notes.end(), [&](const KeyNote& n) { return n.key == key; });
    if (note == notes.end()) {
      notes.push_back(std::move(problem));
    } else if (note->fate != KeyFate::refused) {
      note->fate = KeyFate::refused;
      note->text = std::move(problem.text);
    }
  }
  note_defaults(config);
  return result;
}

}  // namespace mics::detail
