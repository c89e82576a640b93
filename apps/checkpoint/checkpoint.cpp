// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/reshard.hpp>
#include <mics/checkpoint/verify.hpp>
#include <mics/layout/group_layout.hpp>

#include <checkpoint/checkpoint.hpp>
#include <checkpoint/export.hpp>
#include <program/whole_number.hpp>

#include <algorithm>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace mics::apps {
namespace {

using namespace mics::checkpoint;

void warn(LogLevel, std::string_view line) { std::cerr << "mics: warning: " << line << std::endl; }

struct Options {
  std::string directory;
  std::string other;
  std::int64_t step = -1;  // the newest
  bool tensors = false;
  std::int64_t keep = 0;
  std::int64_t keep_every = 0;
  std::string format = "safetensors";
  std::string array = "weights";
  std::string output;
  int ranks = 0;       // as many as saved it
  std::string preset;  // the shard size says it
  int shard_size = 0;
  std::string compute_dtype;  // as it was
};

// The folder of a step that `path` means: itself, or the step asked for, or the newest.
std::filesystem::path step_folder(const std::filesystem::path& path, std::int64_t step) {
  std::error_code error;
  if (step < 0 && std::filesystem::exists(path / commit_name, error)) return path;
  if (step >= 0) return find_step(path, step);
  const std::vector<std::int64_t> steps = list_steps(path);
  if (steps.empty()) {
    raise<FormatError>({.object = in_quotes(path.string()),
                        .expected = "a folder of checkpoints, or one of them",
                        .found = "no step in it"});
  }
  return path / step_name(steps.front());
}

// Gives the step that `path` means to `use`. A job that saves there may remove the step while it is
// read, or replace it: then `use` has what the path means by now, unless it means a step that is
// gone.
template <class Use>
auto on_step(const std::filesystem::path& path, std::int64_t step, const Use& use) {
  SystemCalls& calls = SystemCalls::native();
  for (;;) {
    const std::filesystem::path folder = step_folder(path, step);
    const StepWatch watch(calls, folder);
    try {
      return use(Checkpoint::open(calls, folder));
    } catch (const Error&) {
      const StepWatch::Fate fate = watch.fate();
      if (fate == StepWatch::Fate::same) throw;
      if (fate == StepWatch::Fate::removed && (step >= 0 || folder == path)) {
        raise<IoError>({.object = in_quotes(folder.string()),
                        .expected = "to stay while it is read",
                        .found = "that it was removed meanwhile",
                        .remedy = "the job that saves there keeps newer steps"});
      }
    }
  }
}

Checkpoint open_checkpoint(const std::string& path, std::int64_t step) {
  return on_step(path, step, [](Checkpoint checkpoint) { return checkpoint; });
}

std::string shape_text(const StoredTensor& tensor) {
  std::string text;
  for (const std::int64_t extent : tensor.shape) {
    text += (text.empty() ? "" : " x ") + std::to_string(extent);
  }
  if (text.empty()) text = "scalar";
  if (tensor.complex) text += " complex";
  if (tensor.layout == MemoryLayout::left) text += " column-major";
  if (!tensor.trainable) text += " frozen";
  return text;
}

// Digests by `array tensor`.
std::map<std::string, std::string> digests_of(const Checkpoint& checkpoint) {
  std::map<std::string, std::string> result;
  std::size_t next = 0;
  for (const StoredBuffer& buffer : checkpoint.state().buffers) {
    for (const StoredArray& array : buffer.arrays) {
      for (const StoredSegment& segment : buffer.segments) {
        const StoredTensor& tensor = checkpoint.state().tensor(segment.tensor);
        result[array.name + ' ' + tensor.name] = std::string(name(array.dtype)) + ", " +
                                                 shape_text(tensor) + ", digest " +
                                                 hex(checkpoint.digests()[next++]);
      }
    }
  }
  return result;
}

int inspect(const Options& options) {
  const Checkpoint checkpoint = open_checkpoint(options.directory, options.step);
  const Commit& commit = checkpoint.commit();
  const StoredState& state = checkpoint.state();
  std::int64_t elements = 0;
  for (const StoredTensor& tensor : state.tensors) elements += tensor.count();
  std::int64_t bytes = 0;
  for (const CommittedFile& file : commit.files) bytes += file.bytes;
  std::map<std::string, int> arrays;
  for (const StoredBuffer& buffer : state.buffers) {
    for (const StoredArray& array : buffer.arrays) {
      arrays[array.name + ' ' + std::string(name(array.dtype))] +=
          static_cast<int>(buffer.segments.size());
    }
  }
  std::cout << "step      " << commit.step << '\n'
            << "save      " << commit.id << ", " << commit.time << ", by " << commit.writer << '\n'
            << "digest    " << hex(commit.digest) << '\n'
            << "layout    " << state.grid.world_size << " ranks, shard size "
            << state.grid.shard_size << ", " << state.grid.slices << " slices a shard\n"
            << "files     " << commit.files.size() << ", " << bytes << " bytes\n"
            << "tensors   " << state.tensors.size() << ", " << elements << " elements\n";
  for (const auto& [array, tensors] : arrays) {
    std::cout << "array     " << array << ", " << tensors << " tensors\n";
  }
  for (const auto& [key, value] : state.values.integers) {
    std::cout << "value     " << key << " = " << value << '\n';
  }
  for (const auto& [key, values] : state.values.reals) {
    std::cout << "value     " << key << " =";
    constexpr std::size_t shown = 4;
    for (std::size_t i = 0; i < std::min(values.size(), shown); ++i) std::cout << ' ' << values[i];
    if (values.size() > shown) std::cout << " ... (" << values.size() << ')';
    std::cout << '\n';
  }
  for (const auto& [key, value] : state.values.texts) {
    std::cout << "text      " << key << ", " << value.size() << " bytes\n";
  }
  for (const auto& [key, value] : state.blobs) {
    std::cout << "blob      " << key << ", " << value.size() << " bytes\n";
  }
  if (options.tensors) {
    for (const auto& [key, text] : digests_of(checkpoint)) std::cout << key << ": " << text << '\n';
  }
  return 0;
}

// What is wrong with a step, said and counted; none if it was removed meanwhile.
std::optional<std::size_t> problems_of(const std::filesystem::path& folder) {
  SystemCalls& calls = SystemCalls::native();
  std::vector<std::string> problems;
  for (StepWatch::Fate fate = StepWatch::Fate::replaced; fate == StepWatch::Fate::replaced;) {
    const StepWatch watch(calls, folder);
    try {
      problems = verify(calls, folder);
    } catch (const Error& unreadable) {
      problems = {unreadable.what()};
    }
    fate = problems.empty() ? StepWatch::Fate::same : watch.fate();
    if (fate == StepWatch::Fate::removed) {
      std::cout << folder.string() << ": removed while it was to be read\n";
      return {};
    }
  }
  for (const std::string& problem : problems) {
    std::cout << folder.string() << ": " << problem << '\n';
  }
  if (problems.empty()) std::cout << folder.string() << ": every byte is as it was saved\n";
  return problems.size();
}

int verify_steps(const Options& options) {
  const std::filesystem::path path = options.directory;
  std::error_code error;
  if (options.step >= 0 || std::filesystem::exists(path / commit_name, error)) {
    // One that was asked for and is gone is not as it was saved.
    return problems_of(step_folder(path, options.step)) == 0 ? 0 : 1;
  }
  int status = 0;
  std::set<std::int64_t> seen;
  bool is_changing = true;
  // Where a job removes steps, it has newer ones.
  while (is_changing) {
    is_changing = false;
    static_cast<void>(step_folder(path, -1));  // throws where there is none
    for (const std::int64_t step : list_steps(path)) {
      if (!seen.insert(step).second) continue;
      const auto problems = problems_of(path / step_name(step));
      if (!problems) {
        is_changing = true;
      } else if (*problems > 0) {
        status = 1;
      }
    }
  }
  return status;
}

int diff(const Options& options) {
  const Checkpoint one = open_checkpoint(options.directory, -1);
  const Checkpoint other = open_checkpoint(options.other, -1);
  const auto left = digests_of(one);
  const auto right = digests_of(other);
  int differences = 0;
  const auto tell = [&](const std::string& key, const std::string& a, const std::string& b) {
    std::cout << key << ": " << a << " | " << b << '\n';
    ++differences;
  };
  for (const auto& [key, text] : left) {
    const auto found = right.find(key);
    if (found == right.end()) {
      tell(key, text, "not there");
    } else if (found->second != text) {
      tell(key, text, found->second);
    }
  }
  for (const auto& [key, text] : right) {
    if (!left.contains(key)) tell(key, "not there", text);
  }
  if (one.state().values.integers != other.state().values.integers ||
      one.state().values.texts != other.state().values.texts) {
    tell("values", "step " + std::to_string(one.state().step),
         "step " + std::to_string(other.state().step) + ", others");
  }
  if (differences == 0) std::cout << "equal: digest " << hex(one.commit().digest) << '\n';
  return differences == 0 ? 0 : 1;
}

int prune(const Options& options) {
  const std::vector<std::int64_t> before = list_steps(options.directory);
  if (before.empty()) static_cast<void>(step_folder(options.directory, -1));
  // Throws where `directory` is itself a step.
  DirectoryWriter directory(SystemCalls::native(), options.directory, warn);
  directory.retain(before.front(), {.keep = options.keep, .keep_every = options.keep_every});
  const std::vector<std::int64_t> after = list_steps(options.directory);
  std::cout << before.size() - after.size() << " steps removed, " << after.size() << " kept\n";
  return 0;
}

int export_step(const Options& options) {
  return on_step(options.directory, options.step, [&](const Checkpoint& checkpoint) {
    const std::string output = options.output.empty()
                                   ? step_name(checkpoint.state().step) + ".safetensors"
                                   : options.output;
    const int tensors = export_safetensors(checkpoint, options.array, output);
    std::cout << tensors << " tensors of step " << checkpoint.state().step << " in " << output
              << '\n';
    return 0;
  });
}

// The ranks that a checkpoint is rewritten for.
StoredGrid new_grid(const StoredGrid& old, const Options& options) {
  const int ranks = options.ranks > 0 ? options.ranks : old.world_size;
  // Each shard is a file.
  constexpr int most_shards = 1 << 16;
  const bool named = !options.preset.empty();
  const bool in_groups = !named || options.preset == "mics" || options.preset == "hfsdp";
  int shard = options.preset == "zero2" || options.preset == "zero3" ? ranks : 1;
  if (in_groups) shard = options.shard_size > 0 ? options.shard_size : named ? 0 : old.shard_size;
  if (!in_groups && options.shard_size > 0 && options.shard_size != shard) {
    raise<ConfigError>({.object = "--shard-size",
                        .expected = std::to_string(shard) + ", which is preset " + options.preset,
                        .found = std::to_string(options.shard_size)});
  }
  if (shard < 1 || ranks % shard != 0) {
    std::string fitting;
    for (const int p : layout::shard_sizes_that_fit(ranks)) {
      fitting += (fitting.empty() ? "" : ", ") + std::to_string(p);
    }
    raise<ConfigError>(
        {.object = "--shard-size",
         .expected = "one that divides " + std::to_string(ranks) + " ranks: " + fitting,
         .found = shard < 1 ? "none" : std::to_string(shard)});
  }
  if (shard > most_shards) {
    raise<ConfigError>({.object = "--shard-size",
                        .expected = "at most " + std::to_string(most_shards) + ", each a file",
                        .found = std::to_string(shard)});
  }
  const bool over_world = options.preset.empty()
                              ? old.slices > 1
                              : options.preset == "zero1" || options.preset == "hfsdp";
  return {.world_size = ranks,
          .shard_size = shard,
          .slices = over_world ? ranks / shard : 1,
          .ranks_per_node = std::min(old.ranks_per_node, ranks)};
}

int reshard_checkpoint(const Checkpoint& from, const Options& options) {
  std::error_code error;
  if (std::filesystem::equivalent(from.folder().parent_path(), options.output, error)) {
    raise<ConfigError>({.object = in_quotes(options.output),
                        .expected = "another directory than that of the step",
                        .found = "the same"});
  }
  Reshaping reshaping{.grid = new_grid(from.state().grid, options)};
  if (!options.compute_dtype.empty()) {
    reshaping.compute = parse_dtype(options.compute_dtype, "--compute-dtype");
  }
  DirectoryWriter to(SystemCalls::native(), options.output, warn);
  const Resharded result = reshard(SystemCalls::native(), from, to, reshaping);
  const StoredGrid& old = from.state().grid;
  const auto grid = [](const StoredGrid& g) {
    return std::to_string(g.world_size) + " ranks, shard size " + std::to_string(g.shard_size);
  };
  std::cout << result.folder.string() << ": from " << grid(old) << " to " << grid(reshaping.grid)
            << ", " << result.commit.files.size() << " files\ndigest " << hex(result.commit.digest);
  if (result.converted == 0) {
    std::cout << ", as before\n";
  } else {
    std::cout << "; " << result.converted
              << " arrays of tensors are in another dtype, the others as before\n";
  }
  return 0;
}

int reshard_step(const Options& options) {
  return on_step(options.directory, options.step, [&](const Checkpoint& checkpoint) {
    return reshard_checkpoint(checkpoint, options);
  });
}

}  // namespace

void add_checkpoint(CLI::App& app, const Session& session, Action& action) {
  CLI::App* parent = app.add_subcommand("checkpoint", "Look at checkpoints, on one rank");
  parent->require_subcommand(1);
  const auto options = std::make_shared<Options>();
  const auto add = [&](const char* name, const char* text, int (*run)(const Options&),
                       int status_of_error = 1) {
    CLI::App* command = parent->add_subcommand(name, text);
    command->add_option("DIRECTORY", options->directory, "Folder of checkpoints, or one step of it")
        ->required();
    command->callback([options, run, status_of_error, &session, &action] {
      action.run = [options, run, &session] { return session.is_root() ? run(*options) : 0; };
      action.status_of_error = status_of_error;
    });
    return command;
  };
  const auto add_step = [&](CLI::App* command) {
    command->add_option("--step", options->step, "Step [the newest]")->check(whole_number(0));
  };

  CLI::App* command = add("inspect", "What a checkpoint holds", inspect);
  add_step(command);
  command->add_flag("--tensors", options->tensors, "Lists every tensor of every array");

  command = add("verify", "Reads every byte of all steps, or of one; status 1 if one is wrong",
                verify_steps);
  add_step(command);

  // As diff(1) and cmp(1) have it.
  constexpr int trouble = 2;
  command =
      add("diff",
          "Tensors that differ between two checkpoints; status 0 if none does, 1 if some do, 2 "
          "if that could not be told",
          diff, trouble);
  command->add_option("OTHER", options->other, "The other")->required();

  command = add("prune", "Removes old steps", prune);
  command->add_option("--keep", options->keep, "The newest so many stay")
      ->required()
      ->check(whole_number(1));
  command->add_option("--keep-every", options->keep_every, "Multiples of this stay as well")
      ->check(whole_number(1));

  command = add("reshard", "Rewrites a step as other ranks would have saved it", reshard_step);
  add_step(command);
  command->add_option("TO", options->output, "Folder of checkpoints for the new one")->required();
  command->add_option("--ranks", options->ranks, "World size [as it was]")
      ->check(whole_number(1, most_ranks));
  command->add_option("--preset", options->preset, "Placement [what the shard size says]")
      ->check(CLI::IsMember({"ddp", "zero1", "zero2", "zero3", "mics", "hfsdp"}));
  command->add_option("--shard-size", options->shard_size, "Ranks of a shard group [as it was]")
      ->check(whole_number(1, most_ranks));
  command
      ->add_option("--compute-dtype", options->compute_dtype,
                   "Of parameters that declare none [as it was]")
      ->check(CLI::IsMember({"fp64", "fp32", "bf16", "fp16"}));

  command = add("export", "Writes the tensors of a step into one file", export_step);
  add_step(command);
  command->add_option("OUTPUT", options->output,
                      "The file; default: step-<n>.safetensors in the working directory");
  command->add_option("--format", options->format, "safetensors")
      ->check(CLI::IsMember({"safetensors"}))
      ->capture_default_str();
  command->add_option("--array", options->array, "weights, or an array of the optimizer's")
      ->capture_default_str();
}

}  // namespace mics::apps
