// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/packing.hpp>
#include <mics/checkpoint/detail/shared_read.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/loader.hpp>
#include <mics/checkpoint/writer.hpp>
#include <mics/comm/agreement.hpp>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace mics::checkpoint {
namespace {

using layout::Interval;

// The stages of a load as messages name them.
constexpr const char* listing = "the steps of a directory";
constexpr const char* contents_of_checkpoint = "the contents of a checkpoint";
constexpr const char* comparing = "the digests of a checkpoint";

// The CRC of a range that whole stretches make up; none if they do not. `sums` ascend.
std::optional<std::uint32_t> sum_of(std::span<const ReadSum> sums, int buffer, int array,
                                    const Interval& range, std::int64_t width) {
  auto next = std::lower_bound(sums.begin(), sums.end(), std::tuple(buffer, array, range.offset),
                               [](const ReadSum& sum, const auto& place) {
                                 return std::tuple(sum.buffer, sum.array, sum.range.offset) < place;
                               });
  std::uint32_t crc = 0;
  std::int64_t at = range.offset;
  for (; at < range.end(); ++next) {
    if (next == sums.end() || next->buffer != buffer || next->array != array ||
        next->range.offset != at) {
      return {};
    }
    crc = crc32c_combine(crc, next->crc, next->range.length * width);
    at = next->range.end();
  }
  if (at != range.end()) return {};
  return crc;
}

// What this rank would report of its piece if it saved `targets`, and only those. Memory that is
// not covered by what was summed when it was read is read again.
PieceSums sums_of(const StoredState& state, detail::PieceId id, int parts,
                  std::span<const Target> targets, std::vector<ReadSum> known) {
  std::sort(known.begin(), known.end(), [](const ReadSum& a, const ReadSum& b) {
    return std::tuple(a.buffer, a.array, a.range.offset) <
           std::tuple(b.buffer, b.array, b.range.offset);
  });
  PieceSums sums;
  for (const detail::PieceDataset& dataset : detail::piece_contents(state, id, parts)) {
    const std::int64_t width = bytes_of(dataset.dtype);
    for (const detail::Run& run : dataset.runs) {
      const auto memory = std::find_if(targets.begin(), targets.end(), [&](const Target& to) {
        return to.buffer == run.buffer && to.array == run.array &&
               intersection(to.range, run.range) == run.range;
      });
      for (const detail::TensorPart& part :
           detail::tensor_parts(state.buffer(run.buffer), run.range)) {
        if (memory == targets.end()) {  // not asked for
          sums.part_crcs.push_back(0);
          continue;
        }
        if (const auto crc = sum_of(known, run.buffer, run.array, part.range, width)) {
          sums.part_crcs.push_back(*crc);
          continue;
        }
        const std::byte* const begin =
            memory->data + (part.range.offset - memory->range.offset) * width;
        sums.part_crcs.push_back(
            crc32c({begin, static_cast<std::size_t>(part.range.length * width)}));
      }
    }
  }
  return sums;
}

// Compares the digests of what was loaded with those of what was saved. Collective over `group`.
void require_same_digests(comm::MpiTransport& group, const Checkpoint& checkpoint,
                          const StoredState& target, const layout::Place& place,
                          std::span<const Target> targets, std::vector<ReadSum> known) {
  // Every rank has its part of the shard, slices or not.
  const int parts = target.grid.replicas();
  detail::Packer report;
  comm::agree(group, comparing, [&] {
    const detail::PieceId id{place.shard, place.group};
    report.put(detail::piece_index(id, parts));
    report.put(sums_of(target, id, parts, targets, std::move(known)).part_crcs);
  });
  const auto reports = group.gather(report.bytes(), 0, {comm::Purpose::agreement, comparing, 0});
  comm::agree(group, comparing, [&] {
    if (group.rank() != 0) return;
    std::vector<PieceSums> sums(reports.size());
    for (const std::vector<std::byte>& bytes : reports) {
      detail::Unpacker from(bytes);
      const int index = from.get<int>();
      from.get(sums.at(static_cast<std::size_t>(index)).part_crcs);
    }
    const std::vector<std::uint32_t> digests = combine_digests(target, parts, sums);
    checkpoint.require_same_digests(target, digests, [&](int buffer, int array) {
      return std::any_of(targets.begin(), targets.end(), [&](const Target& to) {
        return to.buffer == buffer && to.array == array;
      });
    });
  });
}

}  // namespace

std::optional<Checkpoint> load(comm::MpiTransport& group, const std::filesystem::path& directory,
                               const StoredState& target, const layout::Place& place,
                               std::span<const Target> targets, const Broadcast& broadcast,
                               std::optional<std::int64_t> step, const LogSink& log,
                               SystemCalls& calls) {
  std::vector<std::int64_t> steps;
  const auto list = [&] {
    steps.clear();
    if (step) {
      steps = {*step};
      return;
    }
    std::vector<std::byte> found;
    comm::agree_patiently(group, listing, [&] {
      if (group.rank() != 0) return;
      steps = list_steps(directory);
      std::error_code ignored;
      if (steps.empty() && std::filesystem::exists(directory / commit_name, ignored)) {
        raise<FormatError>({.object = in_quotes(directory.string()),
                            .expected = "a directory of steps",
                            .found = "one step",
                            .remedy = "name the directory that it is in"});
      }
      const auto here = std::as_bytes(std::span(steps));
      found.assign(here.begin(), here.end());
    });
    comm::broadcast(group, found, 0, listing);
    steps.resize(found.size() / sizeof(std::int64_t));
    if (!found.empty()) std::memcpy(steps.data(), found.data(), found.size());
  };
  list();

  // A job that saves there may remove a step while it is read, or replace it. It has a newer one
  // then: that is found, not an older one.
  std::optional<StepWatch> watch;  // rank 0
  const auto is_another_now = [&] {
    std::vector<std::byte> answer;
    comm::agree_patiently(group, listing, [&] {
      if (group.rank() != 0) return;
      const StepWatch::Fate fate = watch ? watch->fate() : StepWatch::Fate::same;
      // One that was asked for can come back as another only.
      const bool is_another = step
                                  ? fate == StepWatch::Fate::replaced
                                  : fate != StepWatch::Fate::same && !list_steps(directory).empty();
      answer = {static_cast<std::byte>(is_another)};
    });
    comm::broadcast(group, answer, 0, listing);
    return answer.front() != std::byte{0};
  };
  const auto pass_over = [&](std::int64_t damaged, const Error& error) {
    if (!log || group.rank() != 0) return;
    log(LogLevel::warning, std::string(error.what()) + "; step " + std::to_string(damaged) +
                               " is passed over for an older one");
  };
  for (std::size_t i = 0; i < steps.size();) {
    const std::filesystem::path folder = directory / step_name(steps[i]);
    // True if the loop goes on: with the next step, or from the start.
    const auto try_another = [&](const Error& error) {
      if (is_another_now()) {
        list();
        i = 0;
        return true;
      }
      if (i + 1 == steps.size()) return false;
      pass_over(steps[i++], error);
      return true;
    };
    std::optional<Checkpoint> checkpoint;
    try {
      std::vector<std::byte> bytes;
      comm::agree_patiently(group, contents_of_checkpoint, [&] {
        if (group.rank() != 0) return;
        watch.emplace(calls, folder);
        if (step) static_cast<void>(find_step(directory, *step));
        bytes = Checkpoint::fetch(calls, folder);
      });
      comm::broadcast(group, bytes, 0, contents_of_checkpoint);
      comm::agree(group, contents_of_checkpoint,
                  [&] { checkpoint.emplace(Checkpoint::receive(calls, folder, bytes)); });
    } catch (const CommError&) {
      throw;
    } catch (const Error& error) {
      if (try_another(error)) continue;
      throw;
    }
    // Another model or optimizer is no damage, which an older step could mend.
    comm::agree(group, contents_of_checkpoint, [&] {
      checkpoint->require_same_tensors(target);
      checkpoint->require_arrays(target, targets);
    });
    std::vector<ReadSum> sums;
    try {
      sums = detail::read_shared(group, *checkpoint, target, place, targets, broadcast);
    } catch (const CommError&) {
      throw;
    } catch (const Error& error) {
      if (try_another(error)) continue;
      throw;
    }
    require_same_digests(group, *checkpoint, target, place, targets, std::move(sums));
    return checkpoint;
  }
  return {};
}

}  // namespace mics::checkpoint
