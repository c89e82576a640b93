// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/directory.hpp>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <system_error>

namespace mics::checkpoint {
namespace {

constexpr std::string_view prefix = "step-";
constexpr std::string_view temporary = ".tmp-";
constexpr std::string_view trash = ".trash-";
constexpr std::string_view lock_name = ".lock";

// Who holds the lock, for the other job's message.
std::string this_process() {
  std::array<char, 256> host{};
  if (::gethostname(host.data(), host.size() - 1) != 0) host[0] = '?';
  return std::string(host.data()) + ", process " + std::to_string(::getpid());
}

void write_file(SystemCalls& calls, const std::filesystem::path& path,
                std::span<const std::byte> data) {
  File file(calls, path, Access::write);
  file.write(data, 0);
  file.sync();
  file.close();
}

}  // namespace

std::vector<std::string> entries_of(const std::filesystem::path& directory) {
  std::vector<std::string> names;
  std::error_code error;
  do {  // from the start where a signal interrupts it
    names.clear();
    std::filesystem::directory_iterator entry(directory, error);
    for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
      names.push_back(entry->path().filename().string());
    }
  } while (error == std::errc::interrupted);
  if (error) raise_io("list it", directory, error.value());
  return names;
}

std::string step_name(std::int64_t step) {
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.*s%09lld", static_cast<int>(prefix.size()),
                prefix.data(), static_cast<long long>(step));
  return text.data();
}

std::optional<std::int64_t> parse_step_name(std::string_view name) {
  if (!name.starts_with(prefix)) return {};
  const std::string_view digits = name.substr(prefix.size());
  std::int64_t step = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), step);
  if (error != std::errc() || step < 0 || step_name(step) != name) return {};
  return step;
}

std::vector<std::int64_t> list_steps(const std::filesystem::path& directory) {
  std::error_code error;
  if (!std::filesystem::exists(directory, error) && !error) return {};
  std::vector<std::int64_t> steps;
  for (const std::string& name : entries_of(directory)) {
    if (const auto step = parse_step_name(name)) steps.push_back(*step);
  }
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

std::filesystem::path find_step(const std::filesystem::path& directory, std::int64_t step) {
  std::error_code error;
  std::filesystem::path folder = directory / step_name(step);
  if (std::filesystem::exists(folder, error)) return folder;
  const std::vector<std::int64_t> steps = list_steps(directory);
  constexpr std::size_t most_named = 8;
  std::string there;
  for (std::size_t i = 0; i < std::min(steps.size(), most_named); ++i) {
    there += (i == 0 ? "" : ", ") + std::to_string(steps[i]);
  }
  if (steps.size() > most_named) there += ", and older ones";
  raise<IoError>({.object = in_quotes(folder.string()),
                  .expected = "a step of the directory",
                  .found = std::generic_category().message(error ? error.value() : ENOENT),
                  .remedy = there.empty() ? "there is none" : "there are " + there});
}

StepWatch::StepWatch(SystemCalls& calls, std::filesystem::path folder)
    : calls_(&calls), folder_(std::move(folder)), before_(read_commit()) {}

StepWatch::Fate StepWatch::fate() const {
  std::error_code error;
  const auto status = std::filesystem::symlink_status(folder_, error);
  if (status.type() == std::filesystem::file_type::not_found) {
    // A file system that lists what it does not find would have readers look for ever.
    const auto number = parse_step_name(folder_.filename().string());
    const std::vector<std::int64_t> steps = list_steps(folder_.parent_path());
    const bool is_listed = number && std::ranges::find(steps, *number) != steps.end();
    return is_listed ? Fate::same : Fate::removed;
  }
  const auto now = read_commit();
  return now && now != before_ ? Fate::replaced : Fate::same;
}

std::optional<std::vector<std::byte>> StepWatch::read_commit() const {
  try {
    return read_file(*calls_, folder_ / commit_name, std::int64_t{1} << 30);
  } catch (const Error&) {
    return {};
  }
}

std::vector<std::int64_t> steps_to_remove(std::vector<std::int64_t> steps, std::int64_t newest,
                                          const Retention& retention) {
  std::vector<std::int64_t> removed;
  if (retention.keep <= 0) return removed;
  std::erase_if(steps, [&](std::int64_t step) { return step > newest; });
  std::sort(steps.rbegin(), steps.rend());
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const bool recent = static_cast<std::int64_t>(i) < retention.keep || steps[i] == newest;
    const bool milestone = retention.keep_every > 0 && steps[i] % retention.keep_every == 0;
    if (!recent && !milestone) removed.push_back(steps[i]);
  }
  std::reverse(removed.begin(), removed.end());
  return removed;
}

DirectoryWriter::DirectoryWriter(SystemCalls& calls, std::filesystem::path directory, LogSink log)
    : calls_(&calls), directory_(std::move(directory)), log_(std::move(log)) {
  std::error_code error;
  if (std::filesystem::exists(directory_ / commit_name, error)) {
    raise<FormatError>({.object = in_quotes(directory_.string()),
                        .expected = "a directory of steps",
                        .found = "one step",
                        .remedy = "name the directory that it is in"});
  }
  std::filesystem::create_directories(directory_, error);
  if (error) raise_io("create the directory", directory_, error.value());
  if (const auto other = lock()) {
    raise<StateError>({.object = "checkpoints in " + in_quotes(directory_.string()),
                       .expected = "one job that saves there",
                       .found = "another: " + *other,
                       .remedy = "give each job a directory of its own"});
  }
  if (lock_) clear_leftovers();
}

std::optional<std::string> DirectoryWriter::lock() {
  const std::filesystem::path path = directory_ / lock_name;
  File file(*calls_, path, Access::lock);
  try {
    if (!file.try_lock()) {
      const std::vector<std::byte> holder = read_file(*calls_, path, 4096);
      return std::string(reinterpret_cast<const char*>(holder.data()), holder.size());
    }
  } catch (const IoError& unlockable) {
    warn(std::string(unlockable.what()) +
         "; nothing keeps a second job out of the directory, and leftovers are not cleared");
    return {};
  }
  const std::string holder = this_process();
  file.resize(0);
  file.write(std::as_bytes(std::span(holder.data(), holder.size())), 0);
  lock_.emplace(std::move(file));
  return {};
}

void DirectoryWriter::warn(std::string_view line) const noexcept {
  if (!log_) return;
  try {
    log_(LogLevel::warning, line);
  } catch (...) {  // a sink that fails costs its line, not the checkpoint
  }
}

std::filesystem::path DirectoryWriter::begin(std::int64_t step, std::string_view id) {
  // The lock of a file that somebody removed keeps nobody out.
  if (lock_ && !lock_->has_its_name()) {
    if (const auto other = lock()) {
      raise<IoError>({.object = "checkpoints in " + in_quotes(directory_.string()),
                      .expected = "one job that saves there",
                      .found = "another, since .lock was removed: " + *other});
    }
  }
  const std::filesystem::path folder =
      directory_ / (std::string(temporary) + step_name(step) + '-' + std::string(id));
  int status = calls_->mkdir(folder.c_str(), 0777);
  while (status != 0 && errno == EINTR) status = calls_->mkdir(folder.c_str(), 0777);
  if (status != 0) raise_io("create the directory", folder, errno);
  return folder;
}

std::filesystem::path DirectoryWriter::commit(const std::filesystem::path& folder,
                                              const Commit& commit,
                                              std::span<const std::byte> manifest) {
  write_file(*calls_, folder / commit.files.front().name, manifest);
  const std::string text = to_text(commit);
  write_file(*calls_, folder / commit_name, std::as_bytes(std::span(text.data(), text.size())));
  // The entries of the folder before the entry that makes it a step.
  sync_folder(*calls_, folder);

  const std::filesystem::path step = directory_ / step_name(commit.step);
  const auto uninterrupted = [](auto&& call) {
    int status = call();
    while (status != 0 && errno == EINTR) status = call();
    return status;
  };
  const auto unsupported = [] { return errno == EINVAL || errno == ENOSYS || errno == ENOTSUP; };
  int status = uninterrupted([&] { return calls_->rename_new(folder.c_str(), step.c_str()); });
  if (status != 0 && unsupported()) {
    std::error_code error;
    if (!std::filesystem::exists(step, error)) {
      status = uninterrupted([&] { return calls_->rename(folder.c_str(), step.c_str()); });
    } else {
      errno = EEXIST;
    }
  }
  std::optional<std::filesystem::path> replaced;
  if (status != 0 && errno == EEXIST) {
    replaced = directory_ / (std::string(trash) + step_name(commit.step) + '-' + commit.id);
    status = uninterrupted([&] { return calls_->exchange(folder.c_str(), step.c_str()); });
    if (status == 0) {
      replaced = folder;
    } else if (unsupported()) {
      // Without a swap the step is away for an instant; the older ones stay.
      status = uninterrupted([&] { return calls_->rename(step.c_str(), replaced->c_str()); });
      if (status == 0) {
        status = uninterrupted([&] { return calls_->rename(folder.c_str(), step.c_str()); });
        if (status != 0) {
          const int reason = errno;
          calls_->rename(replaced->c_str(), step.c_str());
          errno = reason;
        }
      }
    }
  }
  if (status != 0) raise_io("rename it to " + step.string(), folder, errno);
  sync_folder(*calls_, directory_);
  if (replaced) abandon(*replaced);
  return step;
}

void DirectoryWriter::clear(const std::filesystem::path& folder) {
  std::error_code unknown;
  if (!std::filesystem::is_directory(std::filesystem::symlink_status(folder, unknown))) {
    // A link in a folder's place: what it leads to is not this directory's.
    if (calls_->unlink(folder.c_str()) != 0 && errno != ENOENT)
      raise_io("remove it", folder, errno);
    return;
  }
  for (const std::string& name : entries_of(folder)) {
    const std::filesystem::path file = folder / name;
    if (calls_->unlink(file.c_str()) != 0 && errno != ENOENT) raise_io("remove it", file, errno);
  }
  if (calls_->rmdir(folder.c_str()) != 0 && errno != ENOENT) raise_io("remove it", folder, errno);
}

void DirectoryWriter::abandon(const std::filesystem::path& folder) noexcept {
  try {
    std::error_code error;
    if (std::filesystem::exists(std::filesystem::symlink_status(folder, error))) clear(folder);
  } catch (const std::exception& error) {
    warn(error.what());
  }
}

void DirectoryWriter::clear_leftovers() noexcept {
  try {
    for (const std::string& name : entries_of(directory_)) {
      if (name.starts_with(temporary) || name.starts_with(trash)) abandon(directory_ / name);
    }
  } catch (const std::exception& error) {
    warn(error.what());
  }
}

void DirectoryWriter::remove(std::int64_t step) {
  const std::filesystem::path from = directory_ / step_name(step);
  const std::filesystem::path to = directory_ / (std::string(trash) + step_name(step));
  // One that was not cleared before stands in the way.
  abandon(to);
  if (calls_->rename(from.c_str(), to.c_str()) != 0) raise_io("remove it", from, errno);
  clear(to);
}

void DirectoryWriter::retain(std::int64_t newest, const Retention& retention) noexcept {
  try {
    // A folder without a sound COMMIT is no checkpoint that could stand in for another.
    std::vector<std::int64_t> steps;
    if (retention.keep <= 0) return;
    for (const std::int64_t step : list_steps(directory_)) {
      const std::filesystem::path path = directory_ / step_name(step) / commit_name;
      try {
        const std::vector<std::byte> text = read_file(*calls_, path, std::int64_t{1} << 30);
        static_cast<void>(
            parse_commit({reinterpret_cast<const char*>(text.data()), text.size()}, path.string()));
        steps.push_back(step);
      } catch (const Error& error) {
        warn(std::string(error.what()) + "; left where it is");
      }
    }
    for (const std::int64_t step : steps_to_remove(steps, newest, retention)) remove(step);
  } catch (const std::exception& error) {
    warn(error.what());
  }
}

}  // namespace mics::checkpoint
