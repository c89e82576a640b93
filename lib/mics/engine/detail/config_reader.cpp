// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/engine/detail/config_reader.hpp>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <source_location>
#include <span>
#include <string_view>
#include <utility>

namespace mics::detail {
namespace {

[[noreturn]] void refuse(const std::string& object, const std::string& expected,
                         const std::string& found, const std::string& remedy = {},
                         std::source_location where = std::source_location::current()) {
  raise<ConfigError>({.object = object, .expected = expected, .found = found, .remedy = remedy},
                     where);
}

// The shortest text that reads as the same number.
std::string text_of(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}
std::string text_of(std::int64_t value) { return std::to_string(value); }
std::string text_of(bool value) { return value ? "true" : "false"; }
std::string text_of(const std::array<double, 2>& value) {
  return text_of(value[0]) + ", " + text_of(value[1]);
}

// A key and the reason why nothing here depends on it.
struct Idle {
  std::string_view key;
  std::string_view reason;
};

// A file with more keys that are none is something else; its first ones say enough.
constexpr std::size_t most_unknown = 1000;

// One object of the file. Every key that it holds becomes one note, or one for each key within.
class Section {
 public:
  Section(JsonReader json, ReadConfig& result) : json_(std::move(json)), result_(&result) {}

  [[nodiscard]] JsonReader& json() { return json_; }
  [[nodiscard]] std::string where(const std::string& key) const { return json_.where(key); }

  void note(const std::string& key, KeyFate fate, std::string text) {
    result_->config.report.keys.push_back({full(key), json_.shown(key), fate, std::move(text)});
  }

  // If the key is there: `read` takes the value and says as what; what it throws is a refusal.
  template <class Read>
  void honour(const std::string& key, Read&& read) {
    if (!json_.has(key)) return;
    guard(key, [&] { note(key, KeyFate::honoured, read()); });
  }

  // A value of its own, or the one that "auto" stands for: the deck's or, as it is, the default.
  // `meaning` stands behind the key for people.
  template <class T, class Get>
  void value(const std::string& key, T& field, const std::optional<T>& deck,
             const std::string& meaning, Get&& get) {
    honour(key, [&] {
      if (!json_.is_auto(key)) {
        field = get();
        return meaning;
      }
      if (deck) field = *deck;
      return meaning + ": " + text_of(field) + (deck ? ", the deck's" : ", the default");
    });
  }
  void number(const std::string& key, double& field, const std::string& meaning,
              const std::optional<double>& deck = {}) {
    value(key, field, deck, meaning, [&] { return json_.number(key); });
  }
  void boolean(const std::string& key, bool& field, const std::string& meaning,
               const std::optional<bool>& deck = {}) {
    value(key, field, deck, meaning, [&] { return json_.boolean(key); });
    KeyNote* noted = find(key);
    if (noted != nullptr && noted->value == "false" && noted->fate == KeyFate::honoured) {
      noted->text += ": no";
    }
  }
  void integer(const std::string& key, std::int64_t& field, const std::string& meaning,
               std::int64_t lowest, std::int64_t highest,
               const std::optional<std::int64_t>& deck = {}) {
    value(key, field, deck, meaning, [&] { return json_.integer(key, {}, lowest, highest); });
  }

  template <class Read>
  void section(const std::string& key, Read&& read) {
    if (json_.has(key)) nested(key, read);
  }
  // `section`, and an empty one where the key is not there.
  template <class Read>
  void nested(const std::string& key, Read&& read) {
    guard(key, [&] {
      Section inner(json_.object(key), *result_);
      if (json_.has(key) && inner.json_.keys().empty()) {
        note(key, KeyFate::honoured, "empty: the defaults");
      }
      read(inner);
      inner.finish();
    });
  }

  // The key, or each key of the object that stands there.
  void without_effect(const std::string& key, const std::string& reason) {
    if (!json_.has(key)) return;
    if (json_.is_object(key)) {
      Section inner(json_.object(key), *result_);
      const std::vector<std::string> keys = inner.json_.keys();
      for (const std::string& name : keys) inner.note(name, KeyFate::without_effect, reason);
      if (!keys.empty()) return;
    }
    note(key, KeyFate::without_effect, reason);
  }
  void without_effect(std::span<const Idle> table) {
    for (const Idle& idle : table) without_effect(std::string(idle.key), std::string(idle.reason));
  }
  // Keys that were not asked for so far.
  void rest_without_effect(const std::string& reason) {
    for (const std::string& key : json_.unknown_keys()) without_effect(key, reason);
  }

  // A switch of something that mics does not do and that would change the numbers.
  void must_be_off(const std::string& key, const std::string& remedy) {
    honour(key, [&]() -> std::string {
      if (!json_.is_auto(key) && json_.boolean(key)) refuse(where(key), "false", "true", remedy);
      return "off, as ever here";
    });
  }
  // A section of something that mics does not do and that would change the numbers.
  void must_be_disabled(const std::string& key, const std::string& remedy) {
    if (!json_.has(key)) return;
    guard(key, [&] {
      Section inner(json_.object(key), *result_);
      const bool has_switch = inner.json_.has("enabled");
      const bool enabled = has_switch
                               ? !inner.json_.is_auto("enabled") && inner.json_.boolean("enabled")
                               : inner.json_.dump().find("\"enabled\":true") != std::string::npos;
      if (!enabled) {
        without_effect(key, "it is not enabled");
        return;
      }
      Section& holder = has_switch ? inner : *this;
      const std::string name = has_switch ? "enabled" : key;
      holder.guard(name, [&] { refuse(holder.where(name), "nothing enabled", "true", remedy); });
      inner.rest_without_effect("it belongs to what is refused");
    });
  }

  // Nothing is ignored: what nobody asked for is refused, null is no value.
  void finish() {
    const std::vector<std::string> unknown = json_.unknown_keys();
    for (std::size_t i = 0; i < unknown.size(); ++i) {
      const std::string& key = unknown[i];
      const std::string others = std::to_string(unknown.size() - i) + " keys that are none";
      const bool stops = i == most_unknown && i + 1 < unknown.size();
      guard(key, [&] {
        refuse(where(key), stops ? "known keys" : "a known key",
               stops ? others : in_quotes(name_of(key)),
               stops ? "this is no configuration" : json_.remedy_for(key));
      });
      if (stops) break;
    }
    for (const std::string& key : json_.keys()) {
      if (!json_.has(key) && find(key) == nullptr) note(key, KeyFate::honoured, "no value");
    }
  }

  template <class Read>
  void guard(const std::string& key, Read&& read) {
    try {
      read();
    } catch (const ConfigError& error) {
      const std::string what = error.what();
      const std::string object = where(key);
      const auto at = what.find(object);
      std::string text = at == std::string::npos ? what : what.substr(at + object.size());
      if (text.starts_with(": ")) text = text.substr(2);
      if (KeyNote* noted = find(key)) {
        noted->fate = KeyFate::refused;
        noted->text = text;
      } else {
        note(key, KeyFate::refused, text);
      }
      result_->refusals.push_back(what);
    }
  }

 private:
  [[nodiscard]] std::string full(const std::string& key) const {
    return where(key).substr(result_->config.source.size());
  }
  [[nodiscard]] std::string name_of(const std::string& key) const {
    const std::string path = where({});
    return where(key).substr(path.size());
  }
  [[nodiscard]] KeyNote* find(const std::string& key) {
    auto& notes = result_->config.report.keys;
    const auto note = std::find_if(notes.begin(), notes.end(),
                                   [name = full(key)](const KeyNote& n) { return n.key == name; });
    return note == notes.end() ? nullptr : &*note;
  }

  JsonReader json_;
  ReadConfig* result_;
};

// The deck's value of a key, if its engine section gives one.
class Deck {
 public:
  explicit Deck(const DeckValues& values) : values_(values) {}

  [[nodiscard]] const DeckValues& values() const { return values_; }
  template <class Get>
  [[nodiscard]] auto of(std::string_view key, Get&& get) const
      -> std::optional<std::decay_t<decltype(get(std::declval<const Config&>()))>> {
    if (!values_.engine || !values_.engine->report.gives(key)) return {};
    return get(*values_.engine);
  }

 private:
  const DeckValues& values_;
};

std::string lower_case(std::string text) {
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
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

constexpr std::int64_t most_samples = INT32_MAX;  // a plan counts micro-steps in an int
constexpr std::int64_t most_steps = 1'000'000'000'000'000;

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

void read_zero(Section& zero, Config& config, const Deck& deck) {
  JsonReader& json = zero.json();
  std::int64_t stage = 0;
  zero.honour("stage", [&]() -> std::string {
    const std::optional<std::int64_t> of_deck =
        deck.of("zero_optimization.stage", [](const Config& c) -> std::int64_t {
          return c.preset == Preset::ddp ? 0 : c.preset == Preset::zero2 ? 2 : 3;
        });
    stage = json.is_auto("stage") ? of_deck.value_or(0) : json.integer("stage", {}, 0, 3);
    if (stage == 1) {
      refuse(zero.where("stage"), "0, 2 or 3", "1",
             "stage 2 gives the same numbers with less memory a rank");
    }
    return stage == 0   ? "preset ddp: everything on every rank"
           : stage == 2 ? "preset zero2: parameters gathered once a step"
                        : "parameters gathered when used";
  });
  config.preset = stage == 3 ? Preset::zero3 : stage == 2 ? Preset::zero2 : Preset::ddp;

  zero.honour("mics_shard_size", [&]() -> std::string {
    const std::string key = "mics_shard_size";
    std::int64_t size = -1;
    if (json.is_auto(key)) {
      size = deck.of("zero_optimization.mics_shard_size",
                     [](const Config& c) -> std::int64_t {
                       return c.preset == Preset::mics ? c.shard_size : -1;
                     })
                 .value_or(-1);
    } else {
      size = json.integer(key);
    }
    if (size == 0 || size < -1) {
      refuse(zero.where(key), "1 or more ranks, or -1 for all", std::to_string(size));
    }
    if (size == -1) return "off: shards over all ranks";
    if (stage != 3) refuse(zero.where(key), "stage 3", "stage " + std::to_string(stage));
    if (size > INT32_MAX) refuse(zero.where(key), "at most 2147483647", std::to_string(size));
    config.preset = Preset::mics;
    config.shard_size = static_cast<int>(size);
    return "preset mics: ranks that share one copy of the state";
  });
  zero.honour("mics_hierarchical_params_gather", [&]() -> std::string {
    // Without it the library decides; DeepSpeed's false is the default of a key seldom set.
    const std::string key = "mics_hierarchical_params_gather";
    if (!json.is_auto(key) && json.boolean(key)) {
      config.two_stage = Switch::on;
      return "gathers inside and between nodes apart";
    }
    return "two stages where the nodes allow it";
  });
  for (const char* prefix : {"stage3_", ""}) {
    const std::string parameter = std::string(prefix) + "param_persistence_threshold";
    const std::string model = std::string(prefix) + "model_persistence_threshold";
    zero.integer(parameter, config.persistence_threshold,
                 "parameters of at most so many elements stay gathered", 0, INT64_MAX,
                 deck.of("zero_optimization." + parameter,
                         [](const Config& c) { return c.persistence_threshold; }));
    zero.integer(model, config.persistence_model_threshold,
                 "elements of all parameters that stay gathered", 0, INT64_MAX,
                 deck.of("zero_optimization." + model,
                         [](const Config& c) { return c.persistence_model_threshold; }));
  }

  for (const char* key : {"offload_optimizer", "offload_param"}) {
    zero.section(key, [&](Section& offload) {
      offload.honour("device", [&]() -> std::string {
        const std::string device = offload.json().text("device");
        if (device != "none" && device != "auto") {
          refuse(offload.where("device"), "\"none\"", in_quotes(device.substr(0, 60)),
                 "nothing is offloaded yet: more ranks or a larger shard size lower the memory of "
                 "a rank");
        }
        return "nothing is offloaded";
      });
      offload.rest_without_effect("nothing is offloaded");
    });
  }
  for (const char* key : {"cpu_offload", "cpu_offload_params", "cpu_offload_use_pin_memory"}) {
    zero.must_be_off(key, "nothing is offloaded yet; remove it");
  }
  zero.honour("zero_hpz_partition_size", [&]() -> std::string {
    const std::string key = "zero_hpz_partition_size";
    if (!json.is_auto(key) && json.integer(key, {}, 1) != 1) {
      refuse(zero.where(key), "1", json.shown(key),
             "mics_shard_size of as many ranks keeps gathers inside that group");
    }
    return "no second shards";
  });
  for (const char* key : {"zero_quantized_weights", "zero_quantized_nontrainable_weights",
                          "zero_quantized_gradients"}) {
    zero.must_be_off(key, "what is sent is never quantized; remove it");
  }
  for (const char* key : {"zeropp_loco_param", "zenflow"}) {
    zero.honour(key, [&]() -> std::string {
      refuse(zero.where(key), "no such key", json.shown(key),
             "it changes when and how gradients are applied; remove it");
    });
  }

  static constexpr std::string_view schedule =
      "mics.slots and mics.prefetch bound what is gathered";
  static constexpr std::string_view buffers =
      "a unit's buffer is one collective: there are no buckets";
  static constexpr std::string_view units = "the application declares the units";
  static constexpr std::array<Idle, 35> idle{
      {{"overlap_comm", "gathers start ahead and reductions go on while kernels run, if they can"},
       {"contiguous_gradients", "gradients of a unit always lie in one buffer"},
       {"reduce_scatter", "gradients are always reduce-scattered; the sums are the same"},
       {"reduce_bucket_size", buffers},
       {"allgather_partitions", buffers},
       {"allgather_bucket_size", buffers},
       {"use_multi_rank_bucket_allreduce", buffers},
       {"round_robin_gradients", buffers},
       {"legacy_stage1", "there is one implementation"},
       {"stage3_prefetch_bucket_size", schedule},
       {"prefetch_bucket_size", schedule},
       {"stage3_max_live_parameters", schedule},
       {"max_live_parameters", schedule},
       {"stage3_max_reuse_distance", schedule},
       {"max_reuse_distance", schedule},
       {"sub_group_size", "the update is one pass over the shard"},
       {"load_from_fp32_weights", "master weights never come from 16-bit copies"},
       {"elastic_checkpoint", "nothing of a run depends on it"},
       {"ignore_unused_parameters", "a unit without gradients keeps its values"},
       {"stage3_gather_16bit_weights_on_model_save", "no gathered 16-bit copy is saved"},
       {"gather_16bit_weights_on_model_save", "no gathered 16-bit copy is saved"},
       {"stage3_gather_fp16_weights_on_model_save", "no gathered 16-bit copy is saved"},
       {"stage3_module_granularity_threshold", units},
       {"module_granularity_threshold", units},
       {"leaf_module", units},
       {"stage3_use_all_reduce_for_fetch_params", "a gather gives the same bytes"},
       {"use_all_reduce_for_fetch_params", "a gather gives the same bytes"},
       {"stage3_allgather_sequential", "a gather gives the same bytes"},
       {"allgather_sequential", "a gather gives the same bytes"},
       {"memory_efficient_linear", "kernels are the application's"},
       {"override_module_apply", "initial values come from a generator, the same on every rank"},
       {"pipeline_loading_checkpoint", "nothing of a run depends on it"},
       {"log_trace_cache_warnings", "a changed order of units is always reported"},
       {"enable_sanity_checks", "mics.debug checks every collective"},
       {"save_muon_momentum_buffer_in_memory", "there is no Muon"}}};
  zero.without_effect(idle);
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
