// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>

#include <Kokkos_Macros.hpp>
#include <bench/bench.hpp>
#include <bench/commands.hpp>
#include <program/whole_number.hpp>

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
    action.run = [options, run, &session] { return run(session, *options); };
  });
  return {app, options};
}

void add_pairs(const Command& command) {
  command.app
      ->add_option("--pairs", command.options->pairs,
                   "Measurements, each beside one of the bare call")
      ->check(whole_number(1, 100'000))
      ->capture_default_str();
}

void add_engine_options(const Command& command) {
  std::vector<std::string> names;
  for (const Preset preset : presets) names.emplace_back(name(preset));
  Options& options = *command.options;
  command.app->add_option("--preset", options.preset, "Where the state lives [zero3]")
      ->check(CLI::IsMember(names));
  command.app->add_option("--shard-size", options.shard_size, "p of preset mics, which it implies")
      ->check(whole_number(1, most_ranks));
  command.app
      ->add_option("--ranks-per-node", options.ranks_per_node,
                   "Poses as nodes of so many ranks; default: the nodes as they are")
      ->check(whole_number(1, most_ranks));
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
                  {"optimizer", "AdamW and the gradient's norm beside copies by the same ranks",
                   "Bytes of gradients and optimizer state a rank; well beyond the caches"},
                  bench::run_optimizer, {(device::separate ? 2048 : 512) * mib});
  add_pairs(optimizer);
  optimizer.options->memory = name(device::separate ? Memory::device : Memory::host);
  optimizer.app
      ->add_option("--memory", optimizer.options->memory,
                   "Of the state; device without a device: its code on the host, for tests")
      ->check(CLI::IsMember({std::string(name(Memory::host)), std::string(name(Memory::device))}))
      ->capture_default_str();

  const Command checks =
      add_command(*bench, session, action,
                  {"checks", "Comparisons between ranks beside the step that they guard",
                   "Bytes of a unit; sixteen units are trained"},
                  bench::run_checks, {mib});
  add_pairs(checks);
  add_engine_options(checks);

#ifdef KOKKOS_ENABLE_CUDA
  const Command gpt = add_command(*bench, session, action,
                                  {"gpt", "The parts of a GPT's block of width 2048 on one device",
                                   "Samples of 1024 positions"},
                                  bench::run_gpt, {8});
  add_pairs(gpt);
  const Command overlap = add_command(
      *bench, session, action,
      {"overlap", "What a step's communication adds to its matrix products, on a device",
       "Tokens a rank"},
      bench::run_overlap, {1024, 4096, 8192});
  overlap.options->pairs = 15;
  add_pairs(overlap);
  add_engine_options(overlap);
#endif
#ifdef MICS_HAS_NCCL
  const Command device =
      add_command(*bench, session, action,
                  {"device", "Gathers and reductions of device memory beside NCCL's own calls",
                   "Bytes of the gathered buffers"},
                  bench::run_device, {mib, 8 * mib, 64 * mib, 512 * mib});
  add_pairs(device);
  add_engine_options(device);
  const Command step =
      add_command(*bench, session, action,
                  {"step", "A step of a GPT of 24 layers without its computation, on a device",
                   "Width of the model"},
                  bench::run_step, {2048});
  add_pairs(step);
  add_engine_options(step);
#endif

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
