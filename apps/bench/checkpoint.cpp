// SPDX-License-Identifier: Apache-2.0
#include <mics/mics.hpp>
#include <mics/state/arena.hpp>

#include <Kokkos_Core.hpp>
#include <bench/commands.hpp>
#include <bench/race.hpp>
#include <bench/raw_files.hpp>
#include <bench/results.hpp>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

namespace mics::apps::bench {
namespace {

// The floor of a save and a load is the disk, as the same ranks write and read it; that of a stall
// is what cannot be left out: copying what the rank writes and, for the comparison of replicas,
// reading its shard once.
constexpr double disk_bar = 0.9;
constexpr double stall_bar = 1.2;
constexpr double size_bar = 1.001;
constexpr std::int64_t size_bar_from = std::int64_t{128} << 20;  // bytes a piece
constexpr int layer_count = 24;
// A round of a race moves some gigabytes.
constexpr int warm_up_rounds = 1;
// Where one request follows the other, direct ones are faster the longer they are; through the
// cache the system reads ahead, and short ones stay in the processor's caches.
constexpr std::int64_t direct_request = std::int64_t{8} << 20;
constexpr std::int64_t cached_request = std::int64_t{1} << 20;

/// A folder below the one that was asked for, the same on every rank; goes with the object.
/// Collective.
class Scratch {
 public:
  Scratch(const Session& session, const std::string& directory) : is_root_(session.is_root()) {
    std::string path(4096, '\0');
    comm::agree(comm::Communicator::duplicate(session.world()), [&] {
      if (!is_root_) return;
      path = (std::filesystem::path(directory) / "mics-bench-XXXXXX").string();
      if (::mkdtemp(path.data()) == nullptr) {
        raise<IoError>({.object = in_quotes(directory),
                        .expected = "to make a folder in it",
                        .found = std::generic_category().message(errno)});
      }
      path.resize(4096);
    });
    MPI_Bcast(path.data(), 4096, MPI_CHAR, 0, session.world());
    path_ = path.c_str();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code error;
    if (is_root_) std::filesystem::remove_all(path_, error);
  }
  [[nodiscard]] const std::filesystem::path& path() const { return path_; }

 private:
  bool is_root_;
  std::filesystem::path path_;
};

/// A model whose checkpoint has about `bytes` bytes, after one step: no array is zero.
std::unique_ptr<Engine> make_engine(const Session& session, const Config& config,
                                    std::int64_t bytes) {
  constexpr std::int64_t element_bytes = 12;  // AdamW in fp32: weights and two moments
  Model model;
  std::vector<std::pair<UnitId, ParameterId>> layers;
  for (int i = 0; i < layer_count; ++i) {
    const UnitId unit = model.unit("layer" + std::to_string(i));
    layers.emplace_back(
        unit, model.parameter(unit, "weight",
                              {std::max<std::int64_t>(1, bytes / element_bytes / layer_count)},
                              {.init = Init::normal(0.02)}));
  }
  auto engine = std::make_unique<Engine>(session.world(), model, config);
  engine->begin_micro_step({.samples = 1, .last = true});
  for (auto layer = layers.rbegin(); layer != layers.rend(); ++layer) {
    const auto& [unit, weight] = *layer;
    const Lease lease = engine->gather(unit);
    GradientScope scope = engine->gradient(unit, GradientMode::overwrite);
    Kokkos::deep_copy(scope.view<float*>(weight), lease.view<const float*>(weight));
    scope.reduce();
  }
  engine->step();
  return engine;
}

/// The one step that the bench saves: where it is, and which of its pieces a rank reads as raw
/// bytes.
struct Step {
  Step(const Session& session, std::filesystem::path folder_of_step)
      : folder(std::move(folder_of_step)) {
    std::vector<std::filesystem::path> pieces;
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      files.push_back(entry.path());
      stored_bytes += static_cast<std::int64_t>(entry.file_size());
      const std::string name = entry.path().filename().string();
      if (name.starts_with('s')) pieces.push_back(entry.path());
    }
    std::sort(pieces.begin(), pieces.end());
    writers = static_cast<int>(pieces.size());
    if (session.rank() >= writers) return;
    piece = pieces[static_cast<std::size_t>(session.rank())];
    piece_bytes = static_cast<std::int64_t>(std::filesystem::file_size(piece));
  }

  std::filesystem::path folder;
  std::vector<std::filesystem::path> files;
  std::int64_t stored_bytes = 0;  // of all files
  int writers = 0;                // pieces
  std::filesystem::path piece;    // of this rank; empty: none
  std::int64_t piece_bytes = 0;
};

class Races {
 public:
  Races(const Session& session, const Options& options, const Scratch& scratch, std::int64_t bytes,
        Results& results)
      : session_(session),
        options_(options),
        folder_(scratch.path()),
        results_(results),
        bypass_(can_bypass_cache(folder_)) {
    Config config = engine_config(options);
    // Two replicas where the ranks allow it, so that there is something to compare and to share.
    if (options.preset.empty() && options.shard_size == 0 && session.size() % 2 == 0) {
      config.preset = Preset::mics;
      config.shard_size = session.size() / 2;
    }
    engine_ = make_engine(session, config, bytes);
    state_bytes_ = 12 * engine_->model().count();
    saved_ = checkpoint_of();
  }

  void run() {
    report_size();
    race_saves();
    race_loads();
    race_stalls();
  }

 private:
  [[nodiscard]] std::string directory() const { return (folder_ / "run").string(); }

  std::filesystem::path checkpoint_of() {
    engine_->save(directory());
    for (const auto& entry : std::filesystem::directory_iterator(directory())) {
      if (entry.path().filename().string().starts_with("step-")) return entry.path();
    }
    raise<StateError>({.object = directory(), .expected = "a step", .found = "none"});
  }

  // Removals are not part of what is timed, nor what the file system does about them later.
  void clear() const {
    MPI_Barrier(session_.world());
    if (!session_.is_root()) return;
    std::filesystem::remove_all(saved_);
    for (int rank = 0; rank < session_.size(); ++rank) std::filesystem::remove(raw_path(rank));
    settle(folder_);
  }

  [[nodiscard]] std::filesystem::path raw_path(int rank) const {
    return folder_ / ("raw" + std::to_string(rank));
  }

  void report_size() const {
    const Step step(session_, saved_);
    const double ratio = static_cast<double>(step.stored_bytes) / static_cast<double>(state_bytes_);
    const bool judged = state_bytes_ / step.writers >= size_bar_from;
    results_.line(padded_left("files", 20) + padded(bytes_text(state_bytes_), 11) + " in " +
                  std::to_string(step.writers) + " piece(s): " + number_text(ratio, 6) +
                  " of the state  " +
                  (judged ? results_.judge(ratio <= size_bar, size_bar, 3) : ""));
    results_.record({{"what", "files"},
                     {"state_bytes", state_bytes_},
                     {"stored_bytes", step.stored_bytes},
                     {"pieces", step.writers},
                     {"ratio", ratio}});
  }

  /// Runner 0 is mics, the others are raw.
  void report(const std::string& what, const std::vector<Runner>& runners) {
    const Times times = race(session_.world(), runners, options_.pairs, warm_up_rounds);
    std::size_t best = 1;
    for (std::size_t i = 2; i < times.size(); ++i) {
      if (median(times[i]) < median(times[best])) best = i;
    }
    const double mine = median(times[0]);
    const double raw = median(times[best]);
    const Ratio won = ratio(times[best], times[0]);
    const auto bytes = static_cast<double>(state_bytes_);
    results_.line(padded_left(what, 20) + padded(bytes_text(state_bytes_), 11) +
                  padded(time_text(mine), 10) + padded(time_text(raw), 10) +
                  number_text(bytes / mine * 1e-9, 2, 8) + number_text(bytes / raw * 1e-9, 2, 8) +
                  number_text(won.median, 2, 7) + " (" + number_text(won.low, 2) + "-" +
                  number_text(won.high, 2) + ")  " + padded_left(runners[best].name, 15) +
                  results_.judge(won.median >= disk_bar, disk_bar));
    results_.record({{"what", what},
                     {"state_bytes", state_bytes_},
                     {"mics_seconds", mine},
                     {"raw_seconds", raw},
                     {"raw_kind", runners[best].name},
                     {"ratio", won.median},
                     {"ratio_first_quartile", won.low},
                     {"ratio_third_quartile", won.high},
                     {"pairs", times[0].size()},
                     {"bar", disk_bar}});
  }

  void race_saves() {
    const Step step(session_, saved_);
    const FileBuffer direct(direct_request);
    const FileBuffer cached(cached_request);
    const auto prepare = [this] { clear(); };
    const auto write = [&](Cache cache) {
      if (step.piece_bytes == 0) return;
      write_raw(raw_path(session_.rank()), step.piece_bytes, cache,
                cache == Cache::past ? direct : cached);
    };
    std::vector<Runner> runners{
        {.name = "save", .run = [&] { engine_->save(directory()); }, .prepare = prepare}};
    if (bypass_) {
      runners.push_back(
          {.name = "O_DIRECT", .run = [&] { write(Cache::past); }, .prepare = prepare});
    }
    runners.push_back(
        {.name = "buffered, fsync", .run = [&] { write(Cache::through); }, .prepare = prepare});
    report("synchronous save", runners);
    clear();
  }

  void race_loads() {
    engine_->save(directory());
    const Step step(session_, saved_);
    const FileBuffer direct(direct_request);
    const FileBuffer cached(cached_request);
    const auto prepare = [&] {
      if (!session_.is_root()) return;
      for (const std::filesystem::path& file : step.files) make_cold(file);
    };
    const auto read = [&](Cache cache) {
      if (step.piece.empty()) return;
      read_raw(step.piece, cache, cache == Cache::past ? direct : cached);
    };
    const auto load = [&] {
      if (!engine_->load(directory())) {
        raise<StateError>({.object = directory(), .expected = "a step", .found = "none"});
      }
    };
    std::vector<Runner> runners{{.name = "load", .run = load, .prepare = prepare}};
    if (bypass_) {
      runners.push_back(
          {.name = "O_DIRECT", .run = [&] { read(Cache::past); }, .prepare = prepare});
    }
    runners.push_back(
        {.name = "buffered", .run = [&] { read(Cache::through); }, .prepare = prepare});
    report("load, cold", runners);
    clear();
  }

  void race_stalls() {
    const int shards = engine_->plan().layout().shard_size();
    const std::int64_t shard_bytes = state_bytes_ / shards / 8 * 8;
    const std::int64_t written = state_bytes_ / session_.size() / 8 * 8;
    state::Arena arena(state::arena_bytes(shard_bytes) + state::arena_bytes(written));
    std::byte* const shard = arena.take(shard_bytes, "shard");
    std::byte* const copy = arena.take(written, "copy");
    std::memset(shard, 1, static_cast<std::size_t>(shard_bytes));
    std::uint64_t sum = 0;
    const auto floor = [&] {
      std::memcpy(copy, shard, static_cast<std::size_t>(written));
      const auto* const words = reinterpret_cast<const std::uint64_t*>(shard);
      for (std::int64_t i = 0; i < shard_bytes / 8; ++i) sum += words[i];
    };
    const std::vector<Runner> runners{
        {.name = "stall",
         .run = [&] { engine_->save(directory(), {.asynchronous = true}); },
         .prepare = [this] { clear(); },
         .finish = [this] { engine_->wait_for_save(); }},
        {.name = "floor", .run = floor}};
    const Times times = race(session_.world(), runners, options_.pairs, warm_up_rounds);
    const Ratio longer = ratio(times[0], times[1]);
    const double mine = median(times[0]);
    const double least = median(times[1]);
    const auto both = static_cast<double>(shard_bytes + 2 * written);
    results_.line(padded_left("asynchronous stall", 20) + padded(bytes_text(state_bytes_), 11) +
                  padded(time_text(mine), 10) + padded(time_text(least), 10) +
                  number_text(both / mine * 1e-9, 2, 8) + number_text(both / least * 1e-9, 2, 8) +
                  number_text(longer.median, 2, 7) + " (" + number_text(longer.low, 2) + "-" +
                  number_text(longer.high, 2) + ")  " + padded_left("copy + pass", 15) +
                  results_.judge(longer.median <= stall_bar, stall_bar));
    results_.record({{"what", "asynchronous stall"},
                     {"state_bytes", state_bytes_},
                     {"shard_bytes", shard_bytes},
                     {"written_bytes", written},
                     {"mics_seconds", mine},
                     {"floor_seconds", least},
                     {"ratio", longer.median},
                     {"ratio_first_quartile", longer.low},
                     {"ratio_third_quartile", longer.high},
                     {"pairs", times[0].size()},
                     {"checksum_of_floor", sum},
                     {"bar", stall_bar}});
    clear();
  }

  const Session& session_;
  const Options& options_;
  std::filesystem::path folder_;
  Results& results_;
  bool bypass_;
  std::unique_ptr<Engine> engine_;
  std::int64_t state_bytes_ = 0;
  std::filesystem::path saved_;
};

}  // namespace

int run_checkpoint(const Session& session, const Options& options) {
  Results results(session, "checkpoint", options.json);
  const Scratch scratch(session, options.directory);
  results.line("Checkpoints beside the disk as the same ranks write and read it, " +
               std::to_string(session.size()) + " rank(s), medians of " +
               std::to_string(options.pairs) + " rounds in turn.");
  if (!can_bypass_cache(scratch.path())) {
    results.line("This file system has no direct I/O: all bytes pass through the page cache.");
  }
  results.line(
      "GB/s: of the state; of a stall, bytes that a rank reads and writes. Ratio: speed over raw;");
  results.line("of a stall, time over that of copying the piece and reading the shard once.");
  results.line("                          state      mics       raw    GB/s     raw   ratio");
  for (const std::uint64_t size : options.sizes) {
    Races(session, options, scratch, static_cast<std::int64_t>(size), results).run();
  }
  return results.finish(options.check);
}

}  // namespace mics::apps::bench
