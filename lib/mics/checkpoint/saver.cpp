// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/hash.hpp>
#include <mics/base/host_blocks.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/copy_past_caches.hpp>
#include <mics/checkpoint/detail/manifest.hpp>
#include <mics/checkpoint/detail/packing.hpp>
#include <mics/checkpoint/saver.hpp>
#include <mics/comm/agreement.hpp>

#include <Kokkos_Core.hpp>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <thread>
#include <utility>

namespace mics::checkpoint {
namespace {

using detail::Packer;
using detail::Unpacker;

// The stages of a save as messages name them.
constexpr const char* opening = "a checkpoint's directory";
constexpr const char* state_to_save = "description of the state to save";
constexpr const char* blobs_to_save = "application's blobs to save";
constexpr const char* beginning = "the start of a save";
constexpr const char* laying_out = "the files of a save";
constexpr const char* writing = "the pieces of a save";
constexpr const char* committing = "the commit of a save";
constexpr const char* giving_up = "the end of a save that failed";

template <class T>
bool is_ready(const std::future<T>& future) {
  return !future.valid() || future.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
}

std::vector<std::byte> bytes_of_text(const std::string& text) {
  std::vector<std::byte> bytes(text.size());
  std::memcpy(bytes.data(), text.data(), text.size());
  return bytes;
}

std::string text_of(const std::vector<std::byte>& bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

void pack(Packer& to, const PieceSums& sums) {
  to.put(sums.crc);
  to.put(sums.block_crcs);
  to.put(sums.part_crcs);
}

// Makes what lies in [begin, end) of a source's copies, which ascend.
void make_copies(std::span<const Copy> copies, const std::byte* begin, const std::byte* end) {
  auto copy = std::partition_point(copies.begin(), copies.end(), [=](const Copy& c) {
    return std::less_equal<>()(c.from + c.bytes, begin);
  });
  for (; copy != copies.end() && std::less<>()(copy->from, end); ++copy) {
    const std::byte* const from = std::max(copy->from, begin, std::less<>());
    const std::byte* const to = std::min(copy->from + copy->bytes, end, std::less<>());
    detail::copy_past_caches(copy->to + (from - copy->from), from, to - from);
  }
}

// `hash` and what each block of memory adds to it, in their order; all of the host's threads work.
// `then(begin, end)` for each block when it was read, while the caches hold it. CRCs, as ISA-L
// fetches ahead: memory that is in no cache is read twice as fast as by a loop that multiplies
// words, and what makes the hash takes cores from those who write.
template <class Then>
std::uint64_t hash_blocks(std::uint64_t hash, const std::byte* data, std::int64_t bytes,
                          const Then& then) {
  std::vector<std::uint32_t> crcs(static_cast<std::size_t>(detail::crc_blocks(bytes)));
  std::uint32_t* const out = crcs.data();
  for_host_blocks("mics::checkpoint::hash_blocks", bytes, detail::crc_block_bytes,
                  [=, &then](std::int64_t begin, std::int64_t end) {
                    out[begin / detail::crc_block_bytes] =
                        crc32c({data + begin, static_cast<std::size_t>(end - begin)});
                    then(begin, end);
                  });
  for (const std::uint32_t crc : crcs) hash = hash_combine(hash, crc);
  return hash;
}

// A hash of what replicas have in common: arrays that are here as whole shards. Copies go on the
// way, while the caches hold a block.
std::uint64_t replicated_checksum(const StoredState& state, int tau,
                                  std::span<const Source> sources, std::span<const Copy> copies) {
  std::uint64_t hash = 0;
  for (std::size_t i = 0; i < sources.size(); ++i) {
    const Source& source = sources[i];
    const auto [first, last] =
        std::ranges::equal_range(copies, static_cast<int>(i), std::less<>(), &Copy::source);
    const std::span<const Copy> here(first, last);
    const DType dtype =
        state.buffer(source.buffer).arrays[static_cast<std::size_t>(source.array)].dtype;
    const std::int64_t bytes = source.range.length * bytes_of(dtype);
    if (source.range != state.shard(source.buffer, tau)) {
      make_copies(here, source.data, source.data + bytes);
      continue;
    }
    if (!copies.empty()) {
      const auto copy = [&](std::int64_t begin, std::int64_t end) {
        make_copies(here, source.data + begin, source.data + end);
      };
      hash = hash_blocks(hash, source.data, bytes, copy);
      continue;
    }
    // Beside writes, a block for each thread at once. Gives way between them: on a machine whose
    // cores are all ranks', the threads that feed the disk come first.
    const std::int64_t step =
        detail::crc_block_bytes * Kokkos::DefaultHostExecutionSpace().concurrency();
    for (std::int64_t done = 0; done < bytes; done += step) {
      const auto nothing = [](std::int64_t /*begin*/, std::int64_t /*end*/) {};
      hash = hash_blocks(hash, source.data + done, std::min(step, bytes - done), nothing);
      std::this_thread::yield();
    }
  }
  return hash;
}

// Ranks of each shard whose checksum is not their first replica's, with those that have it.
void require_same_replicas(std::span<const std::uint64_t> checksums, std::span<const int> shards,
                           int shard_count, std::int64_t step) {
  for (int tau = 0; tau < shard_count; ++tau) {
    std::string same;
    std::string other;
    std::optional<std::uint64_t> first;
    for (std::size_t r = 0; r < shards.size(); ++r) {
      if (shards[r] != tau) continue;
      if (!first) first = checksums[r];
      std::string& list = checksums[r] == *first ? same : other;
      list += (list.empty() ? "" : ", ") + std::to_string(r);
    }
    if (other.empty()) continue;
    raise<FormatError>(
        {.object = "shard " + std::to_string(tau) + " of step " + std::to_string(step),
         .expected = "the same bits on all its ranks, as on " + same,
         .found = "others on rank " + other,
         .remedy = "nothing was saved; check those ranks' memory"});
  }
}

}  // namespace

Saver::Saver(comm::MpiTransport& group, std::filesystem::path directory, SaveOptions options,
             LogSink log, SystemCalls& calls)
    : group_(group), options_(options), log_(std::move(log)), calls_(calls) {
  const LogSink keep = [this](LogLevel level, std::string_view line) {
    const std::lock_guard lock(lines_mutex_);
    lines_.emplace_back(level, line);
  };
  comm::agree_patiently(group_, opening, [&] {
    if (group_.rank() == 0) directory_.emplace(calls_, std::move(directory), keep);
  });
  tell();
}

void Saver::tell() {
  std::vector<std::pair<LogLevel, std::string>> lines;
  {
    const std::lock_guard lock(lines_mutex_);
    lines.swap(lines_);
  }
  if (!log_) return;
  for (const auto& [level, line] : lines) log_(level, line);
}

Saver::~Saver() {
  if (stage_ == Stage::idle) return;
  if (written_.valid()) written_.wait();
  if (committed_.valid()) committed_.wait();
  if (stage_ == Stage::writing && group_.rank() == 0 && log_) {
    try {
      log_(LogLevel::warning,
           "save of step " + std::to_string(step_) + " was not waited for and is not committed");
    } catch (...) {  // a sink that fails must not end the process
    }
  }
}

detail::Packer Saver::begin(const StoredState& state, const layout::Place& place,
                            std::span<const Source> sources, bool copy) {
  comm::agree(group_, beginning, [&] {
    if (stage_ != Stage::idle) {
      raise<StateError>({.object = "save of step " + std::to_string(state.step),
                         .expected = "no other save under way",
                         .found = "that of step " + std::to_string(step_),
                         .remedy = "wait() for it first"});
    }
    state.validate();
  });
  const std::string description =
      detail::to_json({.state = state, .id = {}, .parts = 1, .pieces = {}, .blobs = {}});
  comm::require_same(group_,
                     hex(crc32c(std::as_bytes(std::span(description.data(), description.size())))),
                     state_to_save);
  // One rank writes them: what the others have would be lost.
  std::string blobs;
  for (const auto& [key, bytes] : state.blobs) {
    blobs +=
        in_quotes(key) + ' ' + std::to_string(bytes.size()) + " bytes " + hex(crc32c(bytes)) + ' ';
  }
  comm::require_same(group_, blobs, blobs_to_save);

  step_ = state.step;
  tau_ = place.shard;
  shards_ = state.grid.shard_size;
  parts_ = parts_of_shard(state, options_.size);
  std::vector<std::byte> names;
  comm::agree_patiently(group_, beginning, [&] {
    if (group_.rank() != 0) return;
    id_ = make_save_id();
    folder_ = directory_->begin(step_, id_);
    names = bytes_of_text(id_ + folder_.string());
  });
  comm::broadcast(group_, names, 0, beginning);
  id_ = text_of(names).substr(0, 16);
  folder_ = text_of(names).substr(16);

  Packer report;
  try {
    comm::agree(group_, laying_out, [&] {
      writer_.reset();
      copies_.clear();
      const auto part = part_of_replica(place.group, state.grid.replicas(), parts_);
      report.put(part.value_or(-1));
      if (!part) return;
      writer_.emplace(state, detail::PieceId{tau_, *part}, parts_, id_);
      if (copy) {
        const std::int64_t bytes = writer_->payload_bytes();
        if (bytes > staged_bytes_) {
          staged_.reset();
          staged_ = detail::make_file_buffer(bytes);
          staged_bytes_ = bytes;
        }
        copies_ = writer_->stage(sources, {staged_.get(), static_cast<std::size_t>(bytes)});
      } else {
        writer_->attach(sources);
      }
      report.put(detail::piece_index(writer_->id(), parts_));
      report.put(writer_->piece().bytes);
      report.put(writer_->piece().offsets);
    });
  } catch (const CommError&) {
    throw;
  } catch (const std::exception&) {
    give_up();
    throw;
  }
  return report;
}

void Saver::lay_out_step(const StoredState& state, const Packer& report) {
  try {
    const auto reports =
        group_.gather(report.bytes(), 0, {comm::Purpose::agreement, laying_out, 0});
    comm::agree(group_, laying_out, [&] {
      if (group_.rank() != 0) return;
      std::vector<detail::Piece> pieces(static_cast<std::size_t>(shards_ * parts_));
      for (const std::vector<std::byte>& bytes : reports) {
        Unpacker from(bytes);
        if (from.get<int>() < 0) continue;
        const int index = from.get<int>();
        detail::Piece& piece = pieces.at(static_cast<std::size_t>(index));
        if (!piece.file.empty()) {
          raise<ArgumentError>({.object = "places of the ranks",
                                .expected = "one rank for each shard and replica",
                                .found = "two for piece " + std::to_string(index)});
        }
        piece.file = detail::piece_name(detail::piece_id(index, parts_), id_);
        from.get(piece.bytes);
        from.get(piece.offsets);
      }
      step_writer_.emplace(state, parts_, id_, std::move(pieces));
    });
  } catch (const CommError&) {
    throw;
  } catch (const std::exception&) {
    give_up();
    throw;
  }
}

void Saver::give_up() {
  comm::wait_for_all(group_, written_, giving_up);
  writer_.reset();
  step_writer_.reset();
  stage_ = Stage::idle;
  comm::agree_patiently(group_, giving_up, [&] {
    if (group_.rank() == 0) directory_->abandon(folder_);
  });
  tell();
}

void Saver::save(const StoredState& state, const layout::Place& place,
                 std::span<const Source> sources, const SourceInfo& info) {
  const Packer report = begin(state, place, sources, false);
  write_pieces();
  // Beside the writes.
  lay_out_step(state, report);
  read_sources(state, sources, info);
  wait();
}

void Saver::start(const StoredState& state, const layout::Place& place,
                  std::span<const Source> sources, const SourceInfo& info) {
  const Packer report = begin(state, place, sources, !info.lasting);
  lay_out_step(state, report);
  read_sources(state, sources, info);
  // Last: the caller waits for all the rest, which the writes would slow down.
  write_pieces();
}

// What fails here is told when the ranks hand over.
void Saver::read_sources(const StoredState& state, std::span<const Source> sources,
                         const SourceInfo& info) {
  std::promise<std::uint64_t> sum;
  try {
    if (info.replicated || state.grid.replicas() == 1) {
      for (const Copy& copy : copies_) detail::copy_past_caches(copy.to, copy.from, copy.bytes);
      sum.set_value(info.replicated.value_or(0));
    } else {
      sum.set_value(replicated_checksum(state, tau_, sources, copies_));
    }
  } catch (...) {
    sum.set_exception(std::current_exception());
  }
  checksum_ = sum.get_future();
  copies_.clear();
}

void Saver::write_pieces() {
  stage_ = Stage::writing;
  try {
    written_ = comm::on_helper_thread(
        [this] { return writer_ ? writer_->write(calls_, folder_) : PieceSums{}; });
  } catch (...) {  // no thread: known to all when they hand over
    std::promise<PieceSums> failed;
    failed.set_exception(std::current_exception());
    written_ = failed.get_future();
  }
}

void Saver::hand_over() {
  Packer report;
  comm::agree(group_, writing, [&] {
    const PieceSums sums = written_.get();
    if (writer_ && !sums.direct && !told_of_cache_ && group_.rank() == 0) {
      told_of_cache_ = true;
      const std::lock_guard lock(lines_mutex_);
      lines_.emplace_back(LogLevel::information,
                          "checkpoints go through the page cache: the file system of " +
                              in_quotes(directory_->directory().string()) + " has no direct I/O");
    }
    report.put(tau_);
    report.put(checksum_.get());
    report.put(writer_ ? detail::piece_index(writer_->id(), parts_) : -1);
    pack(report, sums);
  });
  const auto reports = group_.gather(report.bytes(), 0, {comm::Purpose::agreement, writing, 0});
  comm::agree(group_, writing, [&] {
    if (group_.rank() != 0) return;
    sums_.assign(static_cast<std::size_t>(shards_ * parts_), {});
    std::vector<std::uint64_t> checksums;
    std::vector<int> shards;
    for (const std::vector<std::byte>& bytes : reports) {
      Unpacker from(bytes);
      shards.push_back(from.get<int>());
      checksums.push_back(from.get<std::uint64_t>());
      const int index = from.get<int>();
      if (index < 0) continue;
      PieceSums& sums = sums_.at(static_cast<std::size_t>(index));
      from.get(sums.crc);
      from.get(sums.block_crcs);
      from.get(sums.part_crcs);
    }
    require_same_replicas(checksums, shards, shards_, step_);
    committed_ = comm::on_helper_thread([this] {
      const Commit commit = step_writer_->complete(sums_);
      std::filesystem::path step = directory_->commit(folder_, commit, step_writer_->manifest());
      directory_->retain(step_, options_.retention);
      return step;
    });
  });
  stage_ = Stage::committing;
}

SaveProgress Saver::finish() {
  std::vector<std::byte> folder;
  comm::agree(group_, committing, [&] {
    if (group_.rank() == 0) folder = bytes_of_text(committed_.get().string());
  });
  comm::broadcast(group_, folder, 0, committing);
  writer_.reset();
  step_writer_.reset();
  stage_ = Stage::idle;
  tell();
  return {SavePhase::committed, step_, {}, text_of(folder)};
}

SaveProgress Saver::poll() {
  if (stage_ == Stage::idle) return {};
  const bool ready = stage_ == Stage::writing ? is_ready(written_) : is_ready(committed_);
  if (!comm::all_of(group_, ready, stage_ == Stage::writing ? writing : committing)) {
    return {SavePhase::staged, step_};
  }
  try {
    if (stage_ == Stage::committing) return finish();
    hand_over();
    return {SavePhase::staged, step_};
  } catch (const CommError&) {
    throw;
  } catch (const std::exception& error) {
    const std::string text = error.what();
    give_up();
    return {SavePhase::failed, step_, text};
  }
}

SaveProgress Saver::wait() {
  try {
    if (stage_ == Stage::writing) {
      comm::wait_for_all(group_, written_, writing);
      hand_over();
    }
    if (stage_ == Stage::committing) {
      comm::wait_for_all(group_, committed_, committing);
      return finish();
    }
  } catch (const CommError&) {
    throw;
  } catch (const std::exception&) {
    give_up();
    throw;
  }
  return {};
}

}  // namespace mics::checkpoint
