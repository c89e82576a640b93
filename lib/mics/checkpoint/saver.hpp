// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/log.hpp>
#include <mics/checkpoint/detail/file_buffer.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/stored_state.hpp>
#include <mics/checkpoint/writer.hpp>
#include <mics/comm/communicator.hpp>
#include <mics/layout/group_layout.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <future>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace mics::checkpoint {

struct SaveOptions {
  Retention retention = {};
  PieceSize size = {};
};

/// How far a save has come; the same on every rank.
enum class SavePhase : std::uint8_t {
  none,       ///< no save was requested, or the last one was told of
  staged,     ///< the memory may change; nothing is certain yet
  committed,  ///< durable: a crash now costs nothing
  failed,     ///< not committed; earlier steps are as they were, and the next save may succeed
};

/// What a save came to.
struct SaveProgress {
  SavePhase phase = SavePhase::none;
  std::int64_t step = 0;
  std::string error = {};             ///< one line, where it failed
  std::filesystem::path folder = {};  ///< of the step, where it is committed
};

/// Saves the state of one job to one directory: every rank writes its piece, rank 0 commits. Calls
/// MPI and libhdf5 on the caller's thread only; a helper thread writes bytes. One save is under way
/// at a time. Every function but progress() is collective over the communicator, blocks for small
/// messages, and after a failure of one rank throws or returns the same on all.
///
///   Saver saver(world, "run/checkpoints", {.retention = {.keep = 3}}, log);
///   saver.start(state, place, sources);       // returns when the state may change
///   ... saver.poll() once a step ...          // commits as soon as all have written
///   saver.wait();                             // or blocks until it is committed
class Saver {
 public:
  /// Rank 0 makes and locks the directory. \throws StateError if another job saves there; IoError
  Saver(const comm::Communicator& world, std::filesystem::path directory, SaveOptions options,
        LogSink log, SystemCalls& calls = SystemCalls::native());
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;
  /// Local: waits for this rank's bytes. A save that was not waited for is not committed; the log
  /// hears of it.
  ~Saver();

  /// What the coming saves give up. Local.
  void retain(const Retention& retention) { options_.retention = retention; }

  /// Writes and commits; blocks until the step is durable. Copies nothing but through two buffers
  /// of 8 MiB.
  /// \param state    the same on every rank
  /// \param place    of this rank: shard and, as group, replica
  /// \param sources  host memory of this rank's shard (or slice) of every array
  /// \throws IoError if a rank could not write; FormatError if replicas differ, naming shard and
  ///         ranks; StateError while another save is under way
  void save(const StoredState& state, const layout::Place& place, std::span<const Source> sources);

  /// Copies what this rank writes, so that the memory may change, and lets a helper thread write
  /// it. Blocks for the copy of 1/R of the shard and, where there are replicas, one read of the
  /// shard. Memory: the copy, kept for the next save. \throws as save(), but for what happens later
  void start(const StoredState& state, const layout::Place& place, std::span<const Source> sources);

  /// Takes a save under way further, without waiting for disks. Tells `committed` and `failed`
  /// once. Cost: nothing where no save is under way, else one all-reduce of 4 bytes.
  SaveProgress poll();

  /// Takes a save under way to its end. \throws IoError, FormatError as save() if it failed
  SaveProgress wait();

  /// True between start() and the end that poll() or wait() told. Local.
  [[nodiscard]] bool under_way() const { return stage_ != Stage::idle; }

 private:
  enum class Stage : std::uint8_t { idle, writing, committing };

  void begin(const StoredState& state, const layout::Place& place, std::span<const Source> sources,
             bool copy);
  // Collective: gathers what the writers report and lets rank 0 commit.
  void hand_over();
  void give_up();
  SaveProgress finish();
  template <class Action>
  void agree(Action&& action);

  const comm::Communicator& world_;
  SaveOptions options_;
  LogSink log_;
  SystemCalls& calls_;
  std::optional<DirectoryWriter> directory_;  // rank 0

  Stage stage_ = Stage::idle;
  std::int64_t step_ = 0;
  int parts_ = 1;
  int shards_ = 1;
  std::filesystem::path folder_;
  std::string id_;
  std::uint64_t checksum_ = 0;  // of what this rank's replicas hold as well
  int tau_ = 0;
  std::optional<PieceWriter> writer_;
  std::optional<StepWriter> step_writer_;  // rank 0
  detail::FileBuffer staged_;
  std::int64_t staged_bytes_ = 0;
  std::vector<PieceSums> sums_;  // rank 0
  std::future<PieceSums> written_;
  std::future<std::filesystem::path> committed_;  // rank 0
};

}  // namespace mics::checkpoint
