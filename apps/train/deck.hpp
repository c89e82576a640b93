// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/json_reader.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/engine/config.hpp>

#include <data/token_sequence.hpp>
#include <gpt/shape.hpp>

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace mics::apps {

/// What `mics train` is told: the model, the text, the course of training, and the engine.
struct Deck {
  std::string path;  ///< of its file
  std::string text;  ///< the whole deck after overrides: the same on every rank

  gpt::GptShape shape;
  gpt::Recompute recompute = gpt::Recompute::no;

  std::vector<std::filesystem::path>
      files;  ///< files and folders; relative ones from the deck's folder
  data::TokenFormat format = data::TokenFormat::bytes;
  std::int64_t synthetic_tokens = 0;  ///< random tokens in place of files
  double validation_fraction = 0.1;
  std::int64_t validation_windows = 0;  ///< 0: all
  std::uint64_t data_seed = 0;

  std::int64_t steps = 0;
  std::int64_t warmup_steps = 0;
  double final_learning_rate_ratio = 0.1;  ///< of the peak, at the end of a cosine
  std::int64_t validate_every = 0;         ///< steps; 0: at the end only
  std::int64_t print_every = 10;           ///< steps between plain lines
  std::string metrics;                     ///< file of JSON lines; empty: none
  double peak_flops = 0;                   ///< of a rank, operations a second; 0: measured
  std::int64_t sample_length = 0;          ///< bytes or tokens sampled at the end
  std::vector<gpt::Token> sample_prompt;   ///< at least one
  double sample_temperature = 0.8;

  // Section `checkpoint`; without a directory nothing is saved.
  std::string checkpoint_directory;
  std::int64_t checkpoint_every = 0;  ///< steps; 0: at the end and on SIGTERM or SIGUSR1
  checkpoint::Retention retention{.keep = 3};
  bool checkpoint_asynchronous = true;
  bool stop_on_checkpoint_error = false;  ///< else a save that fails is a warning

  Config engine;
};

/// Reads and checks a deck. Local; the same result on every rank that has the same file.
/// \param overrides  `key.inner=value`
/// \param deepspeed  a file of DeepSpeed's keys that replaces the `engine` section, with the
///                   overrides of it; "auto" there stands for the deck's values. Empty: none
/// \throws ConfigError for a missing file, a syntax error, an unknown key, a wrong value
[[nodiscard]] Deck read_deck(const std::string& path, std::span<const std::string> overrides,
                             const std::string& deepspeed = {});

/// What "auto" stands for in a deck's own `engine` section: values of `training`.
[[nodiscard]] DeckValues training_values(JsonReader& deck);
/// What "auto" stands for in a file beside the deck: the same, and the `engine` section.
[[nodiscard]] DeckValues deck_values(JsonReader& deck);

/// The batch that the configuration means on `ranks` ranks, of a size that their memory may hold.
/// \throws ConfigError if its sizes contradict each other, or there is nothing to train on
[[nodiscard]] Batch solve_batch(const Config& config, int ranks);

/// Linear from 0 over `warmup`, then a cosine from `peak` to `peak * final_ratio` at the last step.
[[nodiscard]] std::vector<double> learning_rates(const Deck& deck);

}  // namespace mics::apps
