// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/log.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/file_system.hpp>

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace mics::checkpoint {

/// Name of a step's folder: `step-000001200`.
[[nodiscard]] std::string step_name(std::int64_t step);

/// The step of a folder's name; none if it is no such name.
[[nodiscard]] std::optional<std::int64_t> parse_step_name(std::string_view name);

/// Names of what is in a directory, in any order. Local. \throws IoError if it cannot be listed
[[nodiscard]] std::vector<std::string> entries_of(const std::filesystem::path& directory);

/// Steps that have a folder in `directory`, newest first; committed, but not verified. A directory
/// that is not there has none. Local. \throws IoError if it cannot be read
[[nodiscard]] std::vector<std::int64_t> list_steps(const std::filesystem::path& directory);

/// The folder of a step in `directory`. Local. \throws IoError naming the steps that are there if
/// it is not
[[nodiscard]] std::filesystem::path find_step(const std::filesystem::path& directory,
                                              std::int64_t step);

/// Tells what became of a step while it was read. A job that saves to the directory may remove it,
/// by its retention, or put another save of the same number in its place: what was not found then
/// is no damage.
class StepWatch {
 public:
  enum class Fate : std::uint8_t {
    same,
    removed,   ///< no folder of that name is there
    replaced,  ///< its COMMIT is another
  };

  /// Begins where the object is made: reads COMMIT. Local; never throws for a step that is not
  /// there or cannot be read. \param calls  outlives the object
  StepWatch(SystemCalls& calls, std::filesystem::path folder);

  /// Looks again. Local. \throws IoError if the directory cannot be read
  [[nodiscard]] Fate fate() const;

 private:
  [[nodiscard]] std::optional<std::vector<std::byte>> read_commit() const;

  SystemCalls* calls_;
  std::filesystem::path folder_;
  std::optional<std::vector<std::byte>> before_;  // none: COMMIT could not be read
};

/// Which steps outlive a newer one.
struct Retention {
  std::int64_t keep = 0;        ///< the newest so many; 0: all
  std::int64_t keep_every = 0;  ///< and all multiples of this; 0: none
};

/// The steps that retention gives up, oldest first. `newest` (just committed) is never among them,
/// nor is a step after it.
[[nodiscard]] std::vector<std::int64_t> steps_to_remove(std::vector<std::int64_t> steps,
                                                        std::int64_t newest,
                                                        const Retention& retention);

/// Commits steps to a directory; one object in one process of a job, the coordinator's. All
/// functions are local, block until the disk has answered, and throw IoError; whatever happens, a
/// committed step stays, and the next call may succeed.
class DirectoryWriter {
 public:
  /// Makes the directory, locks it against other jobs for the object's life, and clears away what
  /// a killed job left. On a file system without locks it warns and clears nothing.
  /// \throws StateError if another job, or another object, holds it; FormatError for the folder of
  /// one step, which nothing may be added to
  DirectoryWriter(SystemCalls& calls, std::filesystem::path directory, LogSink log);

  [[nodiscard]] const std::filesystem::path& directory() const { return directory_; }

  /// Makes the folder that a step is written into; no reader takes it for a step. Locks the
  /// directory again if the lock's file was removed. \throws IoError if another job has it locked
  /// since
  [[nodiscard]] std::filesystem::path begin(std::int64_t step, std::string_view id);

  /// Turns a folder into a step, once all its other files are written and durable: writes
  /// manifest and COMMIT, and renames. A step of the same number is replaced, in one instant where
  /// the file system can swap. When it has returned, the step is durable.
  /// \return the step's folder
  std::filesystem::path commit(const std::filesystem::path& folder, const Commit& commit,
                               std::span<const std::byte> manifest);

  /// Removes a folder that begin() made. Never throws: what stays is cleared by the next job.
  void abandon(const std::filesystem::path& folder) noexcept;

  /// Removes the steps that retention gives up. Never throws: warns.
  void retain(std::int64_t newest, const Retention& retention) noexcept;

  /// Removes one step: renames it away, then deletes its files. \throws IoError
  void remove(std::int64_t step);

 private:
  // Locks the directory, where that is possible. Returns who has it locked otherwise.
  std::optional<std::string> lock();
  void warn(std::string_view line) const noexcept;
  void clear(const std::filesystem::path& folder);
  void clear_leftovers() noexcept;

  SystemCalls* calls_;
  std::filesystem::path directory_;
  LogSink log_;
  std::optional<File> lock_;
};

}  // namespace mics::checkpoint
