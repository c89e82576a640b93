// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/json_reader.hpp>

#include <gpt/model.hpp>
#include <train/deck.hpp>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string_view>
#include <utility>

namespace mics::apps {
namespace {

// The system would read a name up to a zero byte, and take another file.
void require_name(const std::string& name, const std::string& where) {
  if (name.find('\0') == std::string::npos) return;
  raise<ConfigError>(
      {.object = where, .expected = "a name of a file", .found = "a zero byte in it"});
}

void read_model(JsonReader json, Deck& deck) {
  gpt::GptShape& shape = deck.shape;
  constexpr std::int64_t most = 1 << 20;
  const auto extent = [&](const char* key, int fallback) {
    return static_cast<int>(json.integer(key, fallback, 1, most));
  };
  shape.layers = extent("layers", shape.layers);
  shape.heads = extent("heads", shape.heads);
  shape.width = extent("width", shape.width);
  shape.positions = extent("positions", shape.positions);
  shape.vocabulary = json.has("vocabulary") ? extent("vocabulary", 0) : 0;
  const bool recompute = json.boolean("recompute", false);
  deck.recompute = recompute ? gpt::Recompute::yes : gpt::Recompute::no;
  if (shape.width % shape.heads != 0) {
    raise<ConfigError>({.object = json.where("width"),
                        .expected = "a multiple of the " + std::to_string(shape.heads) + " heads",
                        .found = std::to_string(shape.width)});
  }
  json.finish();
}

data::TokenFormat read_format(JsonReader& json) {
  const std::string text = json.text("format", "bytes");
  for (const auto format : {data::TokenFormat::bytes, data::TokenFormat::uint16,
                            data::TokenFormat::uint32, data::TokenFormat::npy}) {
    if (text == data::name(format)) return format;
  }
  raise<ConfigError>({.object = json.where("format"),
                      .expected = "bytes, uint16, uint32 or npy",
                      .found = in_quotes(text)});
}

void read_data(JsonReader json, const std::filesystem::path& folder, Deck& deck) {
  for (const std::string& file : json.texts("files")) {
    if (file.empty()) {
      raise<ConfigError>({.object = json.where("files"),
                          .expected = "names of files or folders",
                          .found = "an empty name"});
    }
    require_name(file, json.where("files"));
    const std::filesystem::path path(file);
    deck.files.push_back(path.is_absolute() ? path : (folder / path).lexically_normal());
  }
  deck.format = read_format(json);
  deck.synthetic_tokens = json.integer("synthetic_tokens", 0, 0, 100'000'000);
  if (deck.files.empty() && deck.synthetic_tokens == 0) {
    raise<ConfigError>({.object = json.where("files"),
                        .expected = "files or folders to train on",
                        .found = "none"});
  }
  if (!deck.files.empty() && deck.synthetic_tokens > 0) {
    raise<ConfigError>({.object = json.where("synthetic_tokens"),
                        .expected = "no files beside it",
                        .found = std::to_string(deck.files.size())});
  }
  deck.validation_fraction = json.number("validation_fraction", deck.validation_fraction);
  if (!(deck.validation_fraction >= 1e-4 && deck.validation_fraction <= 0.5)) {
    raise<ConfigError>({.object = json.where("validation_fraction"),
                        .expected = "more than 0 (0.0001 or more) and at most 0.5",
                        .found = std::to_string(deck.validation_fraction)});
  }
  deck.validation_windows = json.integer("validation_windows", 0, 0);
  deck.data_seed = static_cast<std::uint64_t>(json.integer("seed", 0, 0));
  json.finish();
}

// What to sample in the end, and what it continues: text, or numbers of tokens.
void read_sample(JsonReader& json, Deck& deck) {
  if (deck.format == data::TokenFormat::bytes) {
    deck.sample_length = json.integer("sample_bytes", 0, 0);
    for (const char c : json.text("sample_prompt", "\n")) {
      deck.sample_prompt.push_back(static_cast<unsigned char>(c));
    }
    if (deck.sample_prompt.empty()) deck.sample_prompt.push_back('\n');
    return;
  }
  deck.sample_length = json.integer("sample_tokens", 0, 0);
  for (const double number : json.numbers("sample_prompt_tokens")) {
    const auto token = static_cast<gpt::Token>(std::clamp(number, 0.0, 4294967295.0));
    if (static_cast<double>(token) != number) {
      raise<ConfigError>({.object = json.where("sample_prompt_tokens"),
                          .expected = "numbers of tokens",
                          .found = std::to_string(number)});
    }
    deck.sample_prompt.push_back(token);
  }
  if (deck.sample_prompt.empty()) deck.sample_prompt.push_back(0);
}

// The vocabulary, once both what the model and what the data say of it is known.
void solve_vocabulary(const std::string& path, Deck& deck) {
  const bool is_text = deck.format == data::TokenFormat::bytes;
  if (deck.shape.vocabulary == 0) {
    if (!is_text) {
      raise<ConfigError>({.object = path + ": model.vocabulary",
                          .expected = "the number of tokens of the vocabulary",
                          .found = "nothing",
                          .remedy = "add the key"});
    }
    deck.shape.vocabulary = 256;
  }
  for (const gpt::Token token : deck.sample_prompt) {
    if (deck.sample_length == 0 || token < static_cast<gpt::Token>(deck.shape.vocabulary)) continue;
    raise<ConfigError>(
        {.object = path + ": training." + (is_text ? "sample_prompt" : "sample_prompt_tokens"),
         .expected = "tokens below the vocabulary of " + std::to_string(deck.shape.vocabulary),
         .found = std::to_string(token)});
  }
}

void read_training(JsonReader json, Deck& deck) {
  deck.steps = json.integer("steps", {}, 1, 100'000'000);
  deck.warmup_steps = json.integer("warmup_steps", 0, 0);
  deck.final_learning_rate_ratio = json.number("final_learning_rate_ratio", 0.1);
  deck.validate_every = json.integer("validate_every", 0, 0);
  deck.print_every = json.integer("print_every", 10, 1);
  deck.metrics = json.text("metrics", "");
  require_name(deck.metrics, json.where("metrics"));
  if (json.has("peak_flops")) {
    deck.peak_flops = json.number("peak_flops");
    if (!(deck.peak_flops > 0)) {
      raise<ConfigError>({.object = json.where("peak_flops"),
                          .expected = "more than 0 operations a second of a rank",
                          .found = std::to_string(deck.peak_flops),
                          .remedy = "leave it out to have it measured"});
    }
  }
  read_sample(json, deck);
  deck.sample_temperature = json.number("sample_temperature", deck.sample_temperature);
  if (!(deck.sample_temperature > 0)) {
    raise<ConfigError>({.object = json.where("sample_temperature"),
                        .expected = "more than 0",
                        .found = std::to_string(deck.sample_temperature)});
  }
  json.finish();
}

// Overrides of the engine section, without its name, apart from the others.
std::vector<std::string> take_engine_overrides(std::vector<std::string>& overrides) {
  static constexpr std::string_view section = "engine.";
  std::vector<std::string> taken;
  std::erase_if(overrides, [&](const std::string& text) {
    if (!text.starts_with(section)) return false;
    taken.push_back(text.substr(section.size()));
    return true;
  });
  return taken;
}

void read_checkpoint(JsonReader json, Deck& deck) {
  deck.checkpoint_directory = json.text("directory", "");
  require_name(deck.checkpoint_directory, json.where("directory"));
  deck.checkpoint_every = json.integer("every", 0, 0);
  deck.retention.keep = json.integer("keep", deck.retention.keep, 0);
  deck.retention.keep_every = json.integer("keep_every", 0, 0);
  deck.checkpoint_asynchronous = json.boolean("asynchronous", deck.checkpoint_asynchronous);
  const std::string on_error = json.text("on_error", "warn");
  if (on_error != "warn" && on_error != "stop") {
    raise<ConfigError>({.object = json.where("on_error"),
                        .expected = "warn or stop",
                        .found = in_quotes(on_error)});
  }
  deck.stop_on_checkpoint_error = on_error == "stop";
  json.finish();
}

}  // namespace

DeckValues training_values(JsonReader& deck) {
  JsonReader training = deck.object("training");
  DeckValues values;
  if (training.has("steps")) values.steps = training.integer("steps");
  if (training.has("warmup_steps")) values.warmup_steps = training.integer("warmup_steps");
  return values;
}

DeckValues deck_values(JsonReader& deck) {
  DeckValues values = training_values(deck);
  values.engine = Config::read(deck.object("engine"), values);
  return values;
}

Deck read_deck(const std::string& path, std::span<const std::string> overrides,
               const std::string& deepspeed) {
  std::vector<std::string> of_deck(overrides.begin(), overrides.end());
  std::vector<std::string> of_engine;
  if (!deepspeed.empty()) of_engine = take_engine_overrides(of_deck);
  JsonReader json = JsonReader::parse_file(path, of_deck);
  Deck deck;
  deck.path = path;
  deck.text = json.dump();
  // For people; `ranks` is what the deck was written for, any number works.
  static_cast<void>(json.text("purpose", ""));
  static_cast<void>(json.text("expected", ""));
  static_cast<void>(json.integer("ranks", 1, 1));
  // A misspelt section is named before anything that it would have held.
  for (const char* section : {"model", "data", "training", "checkpoint", "engine"}) {
    static_cast<void>(json.has(section));
  }
  json.finish();
  read_model(json.object("model"), deck);
  read_data(json.object("data"), std::filesystem::path(path).parent_path(), deck);
  read_training(json.object("training"), deck);
  read_checkpoint(json.object("checkpoint"), deck);
  solve_vocabulary(path, deck);
  if (deepspeed.empty()) {
    deck.engine = Config::read(json.object("engine"), training_values(json));
  } else {
    JsonReader engine = JsonReader::parse_file(deepspeed, of_engine);
    deck.text += engine.dump();
    deck.engine = Config::read(std::move(engine), deck_values(json));
  }
  if (deck.engine.gradient.value_or(deck.engine.compute) != deck.engine.compute) {
    raise<ConfigError>({.object = deck.engine.source + "mics.gradient_dtype",
                        .expected = "the compute dtype, " + std::string(name(deck.engine.compute)) +
                                    ", for this model",
                        .found = std::string(name(*deck.engine.gradient)),
                        .remedy = "leave it out; accumulators have fp32 all the same"});
  }
  if (deck.engine.forward_only) {
    raise<ConfigError>({.object = deck.engine.source + "mics.forward_only",
                        .expected = "false for a run that trains",
                        .found = "true"});
  }
  // The head reads the tied embedding and the final norm at once.
  if (deck.engine.slots < gpt::Gpt::slots_needed) {
    raise<ConfigError>(
        {.object = deck.engine.source + "mics.slots",
         .expected = "at least " + std::to_string(gpt::Gpt::slots_needed) + " for this model",
         .found = std::to_string(deck.engine.slots)});
  }
  return deck;
}

Batch solve_batch(const Config& config, int ranks) {
  const Batch batch = config.solve_batch(ranks);
  constexpr std::int64_t most = 1 << 20;
  if (batch.largest(ranks) > most) {
    raise<ConfigError>({.object = config.source + "train_batch_size",
                        .expected = "at most " + std::to_string(most) + " samples a rank at once",
                        .found = std::to_string(batch.largest(ranks)),
                        .remedy = "raise gradient_accumulation_steps"});
  }
  return batch;
}

std::vector<double> learning_rates(const Deck& deck) {
  const double peak = deck.engine.optimizer.learning_rate;
  std::vector<double> table;
  for (std::int64_t step = 0; step < deck.steps; ++step) {
    if (step < deck.warmup_steps) {
      table.push_back(peak * static_cast<double>(step + 1) /
                      static_cast<double>(deck.warmup_steps));
      continue;
    }
    const auto length =
        static_cast<double>(std::max<std::int64_t>(1, deck.steps - deck.warmup_steps));
    const double progress = static_cast<double>(step - deck.warmup_steps) / length;
    const double cosine = 0.5 * (1 + std::cos(std::numbers::pi * progress));
    const double ratio = deck.final_learning_rate_ratio;
    table.push_back(peak * (ratio + (1 - ratio) * cosine));
  }
  return table;
}

}  // namespace mics::apps
