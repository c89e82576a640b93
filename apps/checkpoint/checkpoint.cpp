// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/verify.hpp>

#include <checkpoint/checkpoint.hpp>
#include <checkpoint/export.hpp>

#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
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
};

// The folder of a step that `path` means: itself, or the step asked for, or the newest.
std::filesystem::path step_folder(const std::filesystem::path& path, std::int64_t step) {
  std::error_code error;
  if (step < 0 && std::filesystem::exists(path / commit_name, error)) return path;
  if (step >= 0) return path / step_name(step);
  const std::vector<std::int64_t> steps = list_steps(path);
  if (steps.empty()) {
    raise<FormatError>({.object = in_quotes(path.string()),
                        .expected = "a folder of checkpoints, or one of them",
                        .found = "no step in it"});
  }
  return path / step_name(steps.front());
}

Checkpoint open_checkpoint(const std::string& path, std::int64_t step) {
  return Checkpoint::open(SystemCalls::native(), step_folder(path, step));
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

int verify_one(const std::filesystem::path& folder) {
  const std::vector<std::string> problems = verify(SystemCalls::native(), folder);
  for (const std::string& problem : problems) {
    std::cout << folder.string() << ": " << problem << '\n';
  }
  if (problems.empty()) std::cout << folder.string() << ": every byte is as it was saved\n";
  return problems.empty() ? 0 : 1;
}

int verify_all(const Options& options) {
  std::error_code error;
  if (options.step >= 0 ||
      std::filesystem::exists(std::filesystem::path(options.directory) / commit_name, error)) {
    return verify_one(step_folder(options.directory, options.step));
  }
  static_cast<void>(step_folder(options.directory, -1));  // throws where there is none
  int status = 0;
  for (const std::int64_t step : list_steps(options.directory)) {
    status |= verify_one(std::filesystem::path(options.directory) / step_name(step));
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
  DirectoryWriter directory(SystemCalls::native(), options.directory, warn);
  directory.retain(before.front(), {.keep = options.keep, .keep_every = options.keep_every});
  const std::vector<std::int64_t> after = list_steps(options.directory);
  std::cout << before.size() - after.size() << " steps removed, " << after.size() << " kept\n";
  return 0;
}

int export_step(const Options& options) {
  const Checkpoint checkpoint = open_checkpoint(options.directory, options.step);
  const int tensors = export_safetensors(checkpoint, options.array, options.output);
  std::cout << tensors << " tensors of step " << checkpoint.state().step << " in " << options.output
            << '\n';
  return 0;
}

}  // namespace

void add_checkpoint(CLI::App& app, const Session& session, Action& action) {
  CLI::App* parent = app.add_subcommand("checkpoint", "Look at checkpoints, on one rank");
  parent->require_subcommand(1);
  const auto options = std::make_shared<Options>();
  const auto add = [&](const char* name, const char* text, int (*run)(const Options&)) {
    CLI::App* command = parent->add_subcommand(name, text);
    command->add_option("DIRECTORY", options->directory, "Folder of checkpoints, or one step of it")
        ->required();
    command->callback([options, run, &session, &action] {
      action = [options, run, &session] { return session.is_root() ? run(*options) : 0; };
    });
    return command;
  };
  const auto add_step = [&](CLI::App* command) {
    command->add_option("--step", options->step, "Step [the newest]")
        ->check(CLI::NonNegativeNumber);
  };

  CLI::App* command = add("inspect", "What a checkpoint holds", inspect);
  add_step(command);
  command->add_flag("--tensors", options->tensors, "Lists every tensor of every array");

  command = add("verify", "Reads every byte of all steps, or of one; status 1 if one is wrong",
                verify_all);
  add_step(command);

  command = add("diff", "Tensors that differ between two checkpoints; status 1 if there are", diff);
  command->add_option("OTHER", options->other, "The other")->required();

  command = add("prune", "Removes old steps", prune);
  command->add_option("--keep", options->keep, "The newest so many stay")
      ->required()
      ->check(CLI::PositiveNumber);
  command->add_option("--keep-every", options->keep_every, "Multiples of this stay as well")
      ->check(CLI::PositiveNumber);

  command = add("export", "Writes the tensors of a step into one file", export_step);
  add_step(command);
  command->add_option("OUTPUT", options->output, "The file")->required();
  command->add_option("--format", options->format, "safetensors")
      ->check(CLI::IsMember({"safetensors"}))
      ->capture_default_str();
  command->add_option("--array", options->array, "weights, or an array of the optimizer's")
      ->capture_default_str();
}

}  // namespace mics::apps
