// SPDX-License-Identifier: Apache-2.0
#include <config/explanation.hpp>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <string_view>
#include <utility>
#include <vector>

namespace mics::apps {
namespace {

constexpr std::size_t line_width = 100;

// The shortest text that reads as the same number.
std::string text_of(double value) {
  std::array<char, 32> text{};
  const auto end = std::to_chars(text.data(), text.data() + text.size(), value).ptr;
  return {text.data(), end};
}

// Words between commas over as many lines as they need.
std::string wrapped(const std::vector<std::string>& words) {
  std::string text = "  ";
  std::size_t column = text.size();
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string word = words[i] + (i + 1 < words.size() ? "," : "");
    if (i > 0 && column + 1 + word.size() > line_width) {
      text += "\n  ";
      column = 2;
    } else if (i > 0) {
      text += ' ';
      ++column;
    }
    text += word;
    column += word.size();
  }
  return text + '\n';
}

std::string assignment(const KeyNote& note) { return note.key + " = " + note.value; }

void add_honoured(std::string& text, const std::vector<KeyNote>& notes) {
  if (notes.empty()) return;
  std::size_t widest = 0;
  for (const KeyNote& note : notes) widest = std::max(widest, assignment(note).size());
  widest = std::min<std::size_t>(widest, 64);
  text += "honoured\n";
  for (const KeyNote& note : notes) {
    std::string line = assignment(note);
    line.resize(std::max(line.size(), widest), ' ');
    text += "  " + line + "  " + note.text + '\n';
  }
}

// Each reason once, behind all the keys that it holds for.
void add_without_effect(std::string& text, const std::vector<KeyNote>& notes) {
  if (notes.empty()) return;
  text += "without effect\n";
  std::vector<std::pair<std::string, std::vector<std::string>>> groups;
  for (const KeyNote& note : notes) {
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const auto& entry) { return entry.first == note.text; });
    if (group == groups.end()) group = groups.insert(group, {note.text, {}});
    group->second.push_back(note.key);
  }
  for (const auto& [reason, keys] : groups) text += wrapped(keys) + "      " + reason + '\n';
}

void add_refused(std::string& text, const std::vector<KeyNote>& notes) {
  if (notes.empty()) return;
  text += "refused\n";
  for (const KeyNote& note : notes) {
    text += "  " + assignment(note) + "\n      " + note.text + '\n';
  }
}

std::string placement(const Config& config) {
  std::string text = "preset " + std::string(name(config.preset));
  if (config.preset == Preset::mics) {
    text += ", " +
            (config.shard_size == Config::one_node ? "the ranks of a node"
                                                   : std::to_string(config.shard_size) + " ranks") +
            " a shard group";
  }
  if (config.forward_only) text += ", forward only";
  if (config.preset == Preset::ddp) return text;
  text += config.two_stage == Switch::on    ? ", two stages"
          : config.two_stage == Switch::off ? ", one stage"
                                            : ", two stages where nodes allow it";
  if (config.ranks_per_node) {
    text += ", " + std::to_string(*config.ranks_per_node) + " ranks a node";
  }
  return text;
}

std::string dtypes(const Config& config) {
  const auto gradient = config.gradient.value_or(config.compute);
  const auto sum = config.accumulate_for(config.compute);
  const auto text = [](const char* what, DType dtype) { return what + std::string(name(dtype)); };
  return text("compute ", config.compute) + text(", gradients ", gradient) +
         text(", hop 1 ", config.wire.value_or(gradient)) + text(", sum ", sum) +
         text(", hop 2 ", config.wire.value_or(sum)) +
         text(", master ", config.master_for(config.compute));
}

std::string optimizer(const OptimizerConfig& o) {
  const std::string rate = "lr " + text_of(o.learning_rate);
  const std::string betas = ", betas " + text_of(o.betas[0]) + " and " + text_of(o.betas[1]);
  const std::string eps = ", eps " + text_of(o.epsilon);
  const std::string bias = o.bias_correction ? "" : ", no bias correction";
  std::string text;
  switch (o.kind) {
    case OptimizerKind::adamw:
      text = "AdamW, " + rate + betas + eps + bias;
      break;
    case OptimizerKind::adam:
      text = "Adam with decay in the gradient, " + rate + betas + eps + bias;
      break;
    case OptimizerKind::sgd:
      text = "SGD, " + rate + ", momentum " + text_of(o.momentum) + ", dampening " +
             text_of(o.dampening) + (o.nesterov ? ", Nesterov" : "");
      break;
    case OptimizerKind::lion:
      text = "Lion, " + rate + betas;
      break;
    case OptimizerKind::adagrad:
      text = "Adagrad, " + rate + eps;
      break;
    case OptimizerKind::lamb:
      text = "LAMB, " + rate + betas + eps + bias + ", ratios " + text_of(o.min_coefficient) +
             " to " + text_of(o.max_coefficient);
      break;
  }
  text += ", weight decay " + text_of(o.weight_decay);
  if (o.ema_decay) text += ", average with decay " + text_of(*o.ema_decay);
  return text;
}

std::string warmup(const ScheduleConfig& s) {
  std::string text = s.warmup_type == WarmupShape::linear ? ", linear" : ", logarithmic";
  text += " warm-up over " + std::to_string(s.warmup_num_steps) + " steps";
  if (s.kind == ScheduleKind::warmup_cosine) {
    text += " from " + text_of(s.warmup_min_ratio) + " of the rate, cosine to " +
            text_of(s.cos_min_ratio) + " of it";
  } else {
    text += " from " + text_of(s.warmup_min_lr) + " to " + text_of(s.warmup_max_lr);
  }
  if (s.kind == ScheduleKind::warmup_decay) text += ", straight to 0";
  if (s.kind != ScheduleKind::warmup) {
    text += " at step " + std::to_string(s.total_num_steps);
  }
  return text;
}

std::string schedule(const ScheduleConfig& s) {
  switch (s.kind) {
    case ScheduleKind::constant:
      return "constant, or what the application sets";
    case ScheduleKind::warmup:
      return "WarmupLR" + warmup(s);
    case ScheduleKind::warmup_decay:
      return "WarmupDecayLR" + warmup(s);
    case ScheduleKind::warmup_cosine:
      return "WarmupCosineLR" + warmup(s);
    case ScheduleKind::lr_range_test:
      return "LRRangeTest, from " + text_of(s.range_min_lr) + ", rate " +
             text_of(s.range_step_rate) + " every " + std::to_string(s.range_step_size) + " steps" +
             (s.range_staircase ? ", stairs" : "");
    case ScheduleKind::one_cycle:
      break;
  }
  const auto second =
      s.cycle_second_step_size > 0 ? s.cycle_second_step_size : s.cycle_first_step_size;
  std::string text = "OneCycle, " + text_of(s.cycle_min_lr) + " to " + text_of(s.cycle_max_lr) +
                     " in " + std::to_string(s.cycle_first_step_size) + " steps, back in " +
                     std::to_string(second);
  if (s.cycle_momentum) {
    text += ", momentum " + text_of(s.cycle_max_mom) + " to " + text_of(s.cycle_min_mom);
  }
  return text;
}

std::string loss_scale(const LossScaleConfig& s) {
  if (!s.dynamic) return text_of(s.initial) + ", static";
  return "dynamic from " + text_of(s.initial) + ", grows after " + std::to_string(s.window) +
         " good steps, falls after " + std::to_string(s.hysteresis) +
         (s.consecutive_hysteresis ? " consecutive" : "") + " overflows, at least " +
         text_of(s.minimum);
}

std::string batch(const Config& config) {
  const auto text = [](const std::optional<std::int64_t>& size) {
    return size ? std::to_string(*size) : std::string("open");
  };
  return "a step " + text(config.train_batch_size) + ", a rank and micro-step " +
         text(config.micro_batch_size) + ", micro-steps " + text(config.accumulation_steps);
}

std::string gradients(const Config& config) {
  std::string text = config.gradient_clipping > 0
                         ? "clipped to the norm " + text_of(config.gradient_clipping)
                         : "not clipped";
  if (config.prescale_gradients) {
    text += ", divided by " + text_of(config.gradient_predivide_factor) + " before they are summed";
  }
  return text;
}

std::string gathers(const Config& config) {
  std::string text = std::to_string(config.slots) + " slots, ";
  text += std::to_string(std::min(config.prefetch.value_or(config.slots - 1), config.slots - 1)) +
          " ahead";
  if (config.persistence_threshold > 0) {
    text += ", parameters of at most " + std::to_string(config.persistence_threshold) +
            " elements stay gathered";
  }
  if (config.memory_budget) text += ", budget " + std::to_string(*config.memory_budget) + " bytes";
  return text;
}

std::string checks(const Config& config) {
  std::string text = "peers waited for " + text_of(config.timeout) + " s";
  if (config.replica_check_every > 0) {
    text += ", replicas compared every " + std::to_string(config.replica_check_every) +
            " steps: " + (config.replica_action == ReplicaCheck::repair ? "repair" : "abort");
  }
  return text + (config.debug ? ", debug" : "");
}

}  // namespace

std::string explanation(const Config& config, const std::string& name) {
  const std::vector<KeyNote> refused = config.report.with(KeyFate::refused);
  std::string text = name + ": ";
  text += refused.empty() ? "usable\n"
                          : std::to_string(refused.size()) +
                                (refused.size() == 1 ? " key is refused\n" : " keys are refused\n");
  add_refused(text, refused);
  add_honoured(text, config.report.with(KeyFate::honoured));
  add_without_effect(text, config.report.with(KeyFate::without_effect));
  text += refused.empty() ? "settings\n" : "settings, as far as keys are not refused\n";
  text += "  placement   " + placement(config) + '\n';
  text += "  batch       " + batch(config) + '\n';
  text += "  dtypes      " + dtypes(config) + '\n';
  text += "  optimizer   " + optimizer(config.optimizer) + '\n';
  text += "  schedule    " + schedule(config.schedule) + '\n';
  text += "  gradients   " + gradients(config) + '\n';
  text += "  loss scale  " + loss_scale(config.loss_scale) + '\n';
  text += "  gathers     " + gathers(config) + '\n';
  text += "  checks      " + checks(config) + '\n';
  if (!config.report.defaults.empty()) text += "defaults that differ from DeepSpeed's\n";
  for (const DefaultNote& note : config.report.defaults) {
    text += "  " + note.key + ": " + note.taken + "; DeepSpeed: " + note.elsewhere + '\n';
  }
  return text;
}

}  // namespace mics::apps
