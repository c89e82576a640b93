// SPDX-License-Identifier: Apache-2.0
#include <mics/engine/detail/config_section.hpp>

#include <cmath>

// The sections `optimizer` and `scheduler`.

namespace mics::detail {
namespace {

// Parameters of DeepSpeed's and PyTorch's classes, whose defaults they take.
void read_optimizer_parameters(Section& params, OptimizerConfig& optimizer, bool is_adam,
                               const Deck& deck) {
  const auto with_deck = [&](const char* key, auto get) {
    return deck.of(std::string("optimizer.params.") + key,
                   [get](const Config& c) { return get(c.optimizer); });
  };
  params.number("lr", optimizer.learning_rate, "learning rate",
                with_deck("lr", [](const OptimizerConfig& o) { return o.learning_rate; }));
  params.number("weight_decay", optimizer.weight_decay, "weight decay",
                with_deck("weight_decay", [](const OptimizerConfig& o) { return o.weight_decay; }));
  params.honour("max_grad_norm", [&]() -> std::string {
    refuse(params.where("max_grad_norm"), "no such parameter", params.json().shown("max_grad_norm"),
           "use gradient_clipping");
  });

  const OptimizerKind kind = optimizer.kind;
  const bool is_lamb = kind == OptimizerKind::lamb;
  if (is_adam || is_lamb || kind == OptimizerKind::lion) {
    params.value("betas", optimizer.betas,
                 with_deck("betas", [](const OptimizerConfig& o) { return o.betas; }),
                 kind == OptimizerKind::lion ? "interpolation and average" : "decay of the moments",
                 [&] {
                   const std::vector<double> betas = params.json().numbers("betas");
                   if (betas.size() != 2) {
                     refuse(params.where("betas"), "two numbers", std::to_string(betas.size()));
                   }
                   return std::array{betas[0], betas[1]};
                 });
  }
  if (is_adam || is_lamb || kind == OptimizerKind::adagrad) {
    params.number("eps", optimizer.epsilon, "added to the root",
                  with_deck("eps", [](const OptimizerConfig& o) { return o.epsilon; }));
  }
  if (is_adam || is_lamb) {
    params.boolean("bias_correction", optimizer.bias_correction, "correction of the moments");
    params.must_be_off("amsgrad", "AMSGrad keeps a third moment; remove it");
  }
  if (is_lamb) {
    params.must_be_off("eps_inside_sqrt", "eps is added to the root; remove it");
    params.number("max_coeff", optimizer.max_coefficient, "largest ratio of norms");
    params.number("min_coeff", optimizer.min_coefficient, "smallest ratio of norms");
  }
  if (kind == OptimizerKind::sgd) {
    params.number("momentum", optimizer.momentum, "momentum");
    params.number("dampening", optimizer.dampening, "dampening");
    params.boolean("nesterov", optimizer.nesterov, "Nesterov's momentum");
  }
  if (kind == OptimizerKind::adagrad) {
    for (const char* key : {"lr_decay", "initial_accumulator_value"}) {
      params.honour(key, [&]() -> std::string {
        if (!params.json().is_auto(key) && params.json().number(key) != 0) {
          refuse(params.where(key), "0", params.json().shown(key), "remove it");
        }
        return "0, as ever here";
      });
    }
  }
  params.must_be_off("maximize", "negate the loss instead");
  static constexpr std::array<Idle, 7> idle{
      {{"fp32_optimizer_states", "states have the dtype of the master weights: fp32 or fp64"},
       {"foreach", "one kernel updates a whole shard"},
       {"fused", "one kernel updates a whole shard"},
       {"capturable", "there is no graph to capture"},
       {"differentiable", "nothing differentiates the update"},
       {"set_grad_none", "gradients live in the engine's slots"},
       {"adamw_mode", "type and adam_w_mode decide"}}};
  params.without_effect(idle);
}

void read_warmup(Section& params, ScheduleConfig& schedule, const Config& config,
                 const DeckValues& deck) {
  const bool is_cosine = schedule.kind == ScheduleKind::warmup_cosine;
  if (is_cosine) {
    params.number("warmup_min_ratio", schedule.warmup_min_ratio, "of the rate, at the start");
    params.number("cos_min_ratio", schedule.cos_min_ratio, "of the rate, at the end");
  } else {
    // WarmupLR climbs to the optimizer's rate, WarmupDecayLR to a rate of its own.
    if (schedule.kind == ScheduleKind::warmup) {
      schedule.warmup_max_lr = config.optimizer.learning_rate;
    }
    params.number("warmup_min_lr", schedule.warmup_min_lr, "rate at the start");
    params.honour("warmup_max_lr", [&]() -> std::string {
      const std::string meaning = "rate after the warm-up";
      if (params.json().is_auto("warmup_max_lr")) {
        schedule.warmup_max_lr = config.optimizer.learning_rate;
        return meaning + ": " + text_of(schedule.warmup_max_lr) + ", the optimizer's";
      }
      schedule.warmup_max_lr = params.json().number("warmup_max_lr");
      return meaning;
    });
  }
  params.integer("warmup_num_steps", schedule.warmup_num_steps, "steps of the warm-up", 0,
                 most_steps, deck.warmup_steps);
  params.honour("warmup_type", [&]() -> std::string {
    const std::string word = params.json().text("warmup_type");
    if (word == "log" || word == "auto") {
      schedule.warmup_type = WarmupShape::logarithmic;
      return "logarithmic";
    }
    if (word != "linear") {
      refuse(params.where("warmup_type"), R"("log" or "linear")", in_quotes(word.substr(0, 60)));
    }
    schedule.warmup_type = WarmupShape::linear;
    return "linear";
  });
  if (schedule.kind == ScheduleKind::warmup) return;
  const std::string key = "total_num_steps";
  if (!params.json().has(key)) {
    params.guard(key,
                 [&] { refuse(params.where(key), "the steps of the run", "nothing", "add it"); });
  } else if (params.json().is_auto(key) && !deck.steps) {
    params.guard(key, [&] {
      refuse(params.where(key), "a number of steps", R"("auto" without a deck)",
             "write the number, or give the deck whose training.steps it stands for");
    });
  } else {
    params.integer(key, schedule.total_num_steps, "steps of the run", 1, most_steps, deck.steps);
  }
}

void read_one_cycle(Section& params, ScheduleConfig& schedule) {
  for (const auto& [key, field] : {std::pair{"cycle_min_lr", &ScheduleConfig::cycle_min_lr},
                                   std::pair{"cycle_max_lr", &ScheduleConfig::cycle_max_lr}}) {
    if (!params.json().has(key)) {
      params.guard(key, [&, name = key] {
        refuse(params.where(name), "a learning rate", "nothing", "add it");
      });
      continue;
    }
    params.honour(key, [&, name = key, member = field]() -> std::string {
      schedule.*member = params.json().number(name);
      return "bound of the cycle";
    });
  }
  params.number("decay_lr_rate", schedule.decay_lr_rate, "decay after the cycle");
  params.integer("cycle_first_step_size", schedule.cycle_first_step_size, "steps upwards", 1,
                 most_steps);
  params.integer("cycle_second_step_size", schedule.cycle_second_step_size, "steps downwards", 1,
                 most_steps);
  params.integer("cycle_first_stair_count", schedule.cycle_first_stair_count, "stairs upwards", 0,
                 most_steps);
  params.integer("cycle_second_stair_count", schedule.cycle_second_stair_count, "stairs downwards",
                 0, most_steps);
  params.integer("decay_step_size", schedule.decay_step_size, "steps of a decay", 0, most_steps);
  params.boolean("cycle_momentum", schedule.cycle_momentum, "momentum moves against the rate");
  params.number("cycle_min_mom", schedule.cycle_min_mom, "smallest momentum");
  params.number("cycle_max_mom", schedule.cycle_max_mom, "largest momentum");
  params.number("decay_mom_rate", schedule.decay_mom_rate, "decay of the momentum");
}

}  // namespace

void read_optimizer(Section& section, Config& config, const Deck& deck) {
  OptimizerConfig& optimizer = config.optimizer;
  JsonReader& json = section.json();
  bool is_adam = true;
  bool known = true;
  std::string type = "adamw";
  section.honour("type", [&]() -> std::string {
    known = false;
    const std::string written = json.text("type");
    type = lower_case(written);
    struct Entry {
      std::string_view type;
      OptimizerKind kind;
    };
    static constexpr std::array<Entry, 6> kinds{{{"adamw", OptimizerKind::adamw},
                                                 {"adam", OptimizerKind::adamw},
                                                 {"sgd", OptimizerKind::sgd},
                                                 {"lion", OptimizerKind::lion},
                                                 {"adagrad", OptimizerKind::adagrad},
                                                 {"lamb", OptimizerKind::lamb}}};
    const auto* entry =
        std::find_if(kinds.begin(), kinds.end(), [&](const Entry& e) { return e.type == type; });
    if (entry == kinds.end()) {
      std::string remedy = "choose one of these";
      if (type == "cpuadam" || type == "deepspeedcpuadam") {
        remedy = "nothing is offloaded: \"AdamW\" gives the same numbers";
      } else if (type.starts_with("onebit") || type == "zerooneadam") {
        remedy = "gradients are not compressed: \"AdamW\" or \"Lamb\" is its uncompressed form";
      } else if (type.starts_with("mu")) {
        remedy = "it updates whole matrices, which a shard cuts through: take \"AdamW\"";
      }
      refuse(section.where("type"), R"("AdamW", "Adam", "SGD", "Lion", "Adagrad" or "Lamb")",
             in_quotes(written.substr(0, 60)), remedy);
    }
    known = true;
    is_adam = entry->kind == OptimizerKind::adamw;
    optimizer.kind = entry->kind;
    if (optimizer.kind == OptimizerKind::lion) optimizer.betas = {0.9, 0.99};
    if (optimizer.kind == OptimizerKind::adagrad) {
      optimizer.learning_rate = 1e-2;
      optimizer.epsilon = 1e-10;
    }
    return type == "adam" ? "AdamW unless adam_w_mode is false" : "the optimizer";
  });
  if (!known) {
    section.without_effect("params", "they belong to the optimizer that is refused");
    return;
  }
  section.section("params", [&](Section& params) {
    if (is_adam) {
      bool decoupled = true;
      params.boolean("adam_w_mode", decoupled, "decay of the weights apart from the gradient");
      if (type == "adam" && !decoupled) optimizer.kind = OptimizerKind::adam;
      params.honour("torch_adam", [&]() -> std::string {
        if (params.json().is_auto("torch_adam") || !params.json().boolean("torch_adam")) {
          return "DeepSpeed's defaults";
        }
        // torch.optim.AdamW decays by 0.01 unless told otherwise, torch.optim.Adam by 0.
        if (optimizer.kind == OptimizerKind::adamw) optimizer.weight_decay = 1e-2;
        return "the same update with the defaults of PyTorch's class: weight_decay " +
               text_of(optimizer.weight_decay);
      });
    }
    read_optimizer_parameters(params, optimizer, is_adam, deck);
  });
}

void read_schedule(Section& section, Config& config, const Deck& deck) {
  struct Entry {
    std::string_view type;
    ScheduleKind kind;
  };
  static constexpr std::array<Entry, 5> kinds{{{"WarmupLR", ScheduleKind::warmup},
                                               {"WarmupDecayLR", ScheduleKind::warmup_decay},
                                               {"WarmupCosineLR", ScheduleKind::warmup_cosine},
                                               {"LRRangeTest", ScheduleKind::lr_range_test},
                                               {"OneCycle", ScheduleKind::one_cycle}}};
  ScheduleConfig& schedule = config.schedule;
  section.honour("type", [&]() -> std::string {
    const std::string type = section.json().text("type");
    const auto* entry =
        std::find_if(kinds.begin(), kinds.end(), [&](const Entry& e) { return e.type == type; });
    if (entry == kinds.end()) {
      refuse(section.where("type"),
             R"("WarmupLR", "WarmupDecayLR", "WarmupCosineLR", "LRRangeTest" or "OneCycle")",
             in_quotes(type.substr(0, 60)), "choose one, or set the rates in the application");
    }
    schedule.kind = entry->kind;
    return "learning rates of the steps";
  });
  if (!section.json().has("type") || schedule.kind == ScheduleKind::constant) {
    section.without_effect("params", "they belong to no schedule that is known");
    return;
  }
  // Where the section is missing its defaults hold, and what it must give is named.
  section.nested("params", [&](Section& params) {
    switch (schedule.kind) {
      case ScheduleKind::constant:
        break;
      case ScheduleKind::warmup:
      case ScheduleKind::warmup_decay:
      case ScheduleKind::warmup_cosine:
        read_warmup(params, schedule, config, deck.values());
        break;
      case ScheduleKind::lr_range_test:
        params.number("lr_range_test_min_lr", schedule.range_min_lr, "rate at the start");
        params.integer("lr_range_test_step_size", schedule.range_step_size, "steps of a stair", 1,
                       most_steps);
        params.number("lr_range_test_step_rate", schedule.range_step_rate, "growth of a stair");
        params.boolean("lr_range_test_staircase", schedule.range_staircase, "stairs, not a slope");
        break;
      case ScheduleKind::one_cycle:
        read_one_cycle(params, schedule);
        break;
    }
    params.honour("last_batch_iteration", [&]() -> std::string {
      if (params.json().integer("last_batch_iteration") != -1) {
        refuse(params.where("last_batch_iteration"), "-1",
               params.json().shown("last_batch_iteration"), "a run starts at its first step");
      }
      return "the start, as ever here";
    });
  });
}

}  // namespace mics::detail
