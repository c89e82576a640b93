// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/log.hpp>
#include <mics/checkpoint/detail/file_buffer.hpp>
#include <mics/checkpoint/detail/packing.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/stored_state.hpp>
#include <mics/checkpoint/writer.hpp>
#include <mics/comm/mpi_transport.hpp>
#include <mics/layout/group_layout.hpp>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

namespace mics::checkpoint {

struct SaveOptions {
  Retention retention = {};
  PieceSize size = {};
};

/// What is known of the memory that a save is given.
struct SourceInfo {
  /// It stays as it is until the save has ended: start() copies nothing.
  bool lasting = false;
  /// A hash of all that this rank's replicas hold as well, made in one way by all ranks. None: one
  /// of the sources that are whole shards is made; to write, the part of written_range() is enough.
  std::optional<std::uint64_t> replicated = {};
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
/// MPI and libhdf5 on the caller's thread only; what waits for a disk runs on a helper thread. One
/// save is under way at a time. Functions that are not said to be local are collective over the
/// group, block for small messages, and after a failure of one rank throw or return the same on
/// all.
///
/// A rank that is gone or does not come ends every function in CommError on the others, within the
/// transport's time limit; how long disks take does not count. A save that ends so is committed
/// whole or not at all, and earlier steps stay. After a CommError the object can only be destroyed,
/// and until then the memory to write must live on.
///
///   Saver saver(group, "run/checkpoints", {.retention = {.keep = 3}}, log);
///   saver.start(state, place, sources);       // returns when the state may change
///   ... saver.poll() once a step ...          // commits as soon as all have written
///   saver.wait();                             // or blocks until it is committed
class Saver {
 public:
  /// Rank 0 makes and locks the directory. \param group  all ranks of the job; outlives the object
  /// \throws StateError if another job saves there; IoError
  Saver(comm::MpiTransport& group, std::filesystem::path directory, SaveOptions options,
        LogSink log, SystemCalls& calls = SystemCalls::native());
  Saver(const Saver&) = delete;
  Saver& operator=(const Saver&) = delete;
  /// Local: waits for this rank's bytes. A save that was not waited for is not committed; the log
  /// hears of it.
  ~Saver();

  /// What the coming saves give up. Local.
  void retain(const Retention& retention) { options_.retention = retention; }

  /// Writes and commits; blocks until the step is durable. Copies nothing but through 8 MiB of
  /// buffers.
  /// \param state    the same on every rank
  /// \param place    of this rank: shard and, as group, replica
  /// \param sources  host memory of this rank's shard (or slice, or written_range()) of every array
  /// \throws IoError if a rank could not write; FormatError if replicas differ, naming shard and
  ///         ranks; StateError while another save is under way
  void save(const StoredState& state, const layout::Place& place, std::span<const Source> sources,
            const SourceInfo& info = {});

  /// Copies what this rank writes, so that the memory may change, and lets a helper thread write
  /// it. Blocks for one read of the shard where there are replicas, and the copy of 1/R of it on
  /// the way; else for the copy. Memory: the copy, kept for the next save. \throws as save(), but
  /// for what happens later
  void start(const StoredState& state, const layout::Place& place, std::span<const Source> sources,
             const SourceInfo& info = {});

  /// Takes a save under way further, without waiting for disks. Tells `committed` and `failed`
  /// once. Cost: nothing where no save is under way, else one exchange of 1 byte a rank.
  SaveProgress poll();

  /// Takes a save under way to its end. \throws IoError, FormatError as save() if it failed
  SaveProgress wait();

  /// True between start() and the end that poll() or wait() told. Local.
  [[nodiscard]] bool under_way() const { return stage_ != Stage::idle; }

 private:
  enum class Stage : std::uint8_t { idle, writing, committing };

  // What this rank reports of its piece, which is laid out then; what is to be copied: copies_.
  detail::Packer begin(const StoredState& state, const layout::Place& place,
                       std::span<const Source> sources, bool copy);
  // Collective: lets rank 0 lay out the manifest of the pieces that are reported.
  void lay_out_step(const StoredState& state, const detail::Packer& report);
  // Makes copies_ and the hash, in one pass over the memory.
  void read_sources(const StoredState& state, std::span<const Source> sources,
                    const SourceInfo& info);
  void write_pieces();
  // Collective: gathers what the writers report and lets rank 0 commit.
  void hand_over();
  void give_up();
  SaveProgress finish();
  // What the helper thread had to say is told on the caller's.
  void tell();

  comm::MpiTransport& group_;
  SaveOptions options_;
  LogSink log_;
  SystemCalls& calls_;
  std::mutex lines_mutex_;
  std::vector<std::pair<LogLevel, std::string>> lines_;  // not told yet; guarded by lines_mutex_
  std::optional<DirectoryWriter> directory_;             // rank 0
  bool told_of_cache_ = false;

  Stage stage_ = Stage::idle;
  std::int64_t step_ = 0;
  int parts_ = 1;
  int shards_ = 1;
  std::filesystem::path folder_;
  std::string id_;
  std::future<std::uint64_t> checksum_;  // of what this rank's replicas hold as well
  int tau_ = 0;
  std::optional<PieceWriter> writer_;
  std::optional<StepWriter> step_writer_;  // rank 0
  detail::FileBuffer staged_;
  std::int64_t staged_bytes_ = 0;
  std::vector<Copy> copies_;     // into staged_, not made yet
  std::vector<PieceSums> sums_;  // rank 0
  std::future<PieceSums> written_;
  std::future<std::filesystem::path> committed_;  // rank 0
};

}  // namespace mics::checkpoint
