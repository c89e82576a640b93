// SPDX-License-Identifier: Apache-2.0
#include <bench/bench.hpp>
#include <bench/commands.hpp>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace mics::apps {
namespace {

using bench::Options;
using Run = int (*)(const Session&, const Options&);

constexpr std::array presets{Preset::ddp, Preset::zero2, Preset::zero3, Preset::mics};

struct Texts {
  const char* name;
  const char* description;
  const char* sizes;  // what --sizes means
};

struct Command {
  CLI::App* app;
  std::shared_ptr<Options> options;
};

Command add_command(CLI::App& parent, const Session& session, Action& action, const Texts& texts,
                    Run run, std::vector<std::uint64_t> sizes) {
  auto options = std::make_shared<Options>();
  options->sizes = std::move(sizes);
  CLI::App* app = parent.add_subcommand(texts.name, texts.description);
  app->add_option("--sizes", options->sizes, texts.sizes)
      ->transform(CLI::AsSizeValue(false))
      ->delimiter(',')
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app->add_option("--json", options->json, "File for the results, one JSON object a line");
  app->add_flag("--check", options->check, "Exit with status 1 if a bar is missed");
  app->callback([options, run, &session, &action] {
    action = [options, run, &session] { return run(session, *options); };
  });
  return {app, options};
}

void add_pairs(const Command& command) {
  command.app
      ->add_option("--pairs", command.options->pairs,
                   "Measurements, each beside one of the bare call")
      ->check(CLI::Range(1, 100'000))
      ->capture_default_str();
}

void add_engine_options(const Command& command) {
  std::vector<std::string> names;
  for (const Preset preset : presets) names.emplace_back(name(preset));
  Options& options = *command.options;
  command.app->add_option("--preset", options.preset, "Where the state lives [zero3]")
      ->check(CLI::IsMember(names));
  command.app->add_option("--shard-size", options.shard_size, "p of preset mics, which it implies")
      ->check(CLI::PositiveNumber);
  command.app
      ->add_option("--ranks-per-node", options.ranks_per_node,
                   "Poses as nodes of so many ranks; default: the nodes as they are")
      ->check(CLI::PositiveNumber);
}

}  // namespace

Config bench::engine_config(const Options& options) {
  Config config;
  const std::string word =
      !options.preset.empty() ? options.preset : (options.shard_size > 0 ? "mics" : "zero3");
  for (const Preset preset : presets) {
    if (word == name(preset)) config.preset = preset;
  }
  config.shard_size = options.shard_size;
  if (options.ranks_per_node > 0) config.ranks_per_node = options.ranks_per_node;
  return config;
}

void add_bench(CLI::App& app, const Session& session, Action& action) {
  constexpr std::uint64_t kib = 1024;
  constexpr std::uint64_t mib = 1024 * kib;
  CLI::App* bench = app.add_subcommand("bench", "Measure mics beside the machine's own speed");
  bench->require_subcommand(1);

  const Command collectives =
      add_command(*bench, session, action,
                  {"collectives", "Gathers and reductions of a unit beside the bare MPI calls",
                   "Bytes of the gathered buffers, such as 64KiB,1MiB"},
                  bench::run_collectives, {64 * kib, mib, 16 * mib, 128 * mib});
  add_pairs(collectives);
  add_engine_options(collectives);

  const Command optimizer =
      add_command(*bench, session, action,
                  {"optimizer", "AdamW and the gradient's norm beside memcpy by the same ranks",
                   "Bytes of gradients and optimizer state a rank; well beyond the caches"},
                  bench::run_optimizer, {512 * mib});
  add_pairs(optimizer);

  const Command checks =
      add_command(*bench, session, action,
                  {"checks", "Comparisons between ranks beside the step that they guard",
                   "Bytes of a unit; sixteen units are trained"},
                  bench::run_checks, {mib});
  add_pairs(checks);
  add_engine_options(checks);

  const Command memory =
      add_command(*bench, session, action,
                  {"memory", "Peak resident memory of a training run beside its plan",
                   "Bytes of training state a rank, slots apart"},
                  bench::run_memory, {384 * mib});
  add_engine_options(memory);

  const Command checkpoint =
      add_command(*bench, session, action,
                  {"checkpoint", "Saves and loads beside raw files, stalls beside copies in memory",
                   "Bytes of the state of all ranks"},
                  bench::run_checkpoint, {1024 * mib});
  checkpoint.options->pairs = 11;
  add_pairs(checkpoint);
  add_engine_options(checkpoint);
  checkpoint.app
      ->add_option("--directory", checkpoint.options->directory,
                   "On the disk to measure; a folder in it is used and removed")
      ->check(CLI::ExistingDirectory)
      ->capture_default_str();
}

}  // namespace mics::apps
