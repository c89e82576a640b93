// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/detail/shared_read.hpp>
#include <mics/comm/agreement.hpp>

#include <algorithm>
#include <future>
#include <numeric>
#include <stop_token>
#include <tuple>
#include <utility>

namespace mics::checkpoint::detail {
namespace {

using layout::Interval;

constexpr const char* reading = "the bytes of a checkpoint";

// Part `part` of a range, in units of 256 scalars: as a shard is cut into slices.
Interval cut(const Interval& range, int part, int parts) {
  constexpr std::int64_t unit = 256;
  const std::int64_t units = (range.length + unit - 1) / unit;
  const auto at = [&](std::int64_t i) {
    return std::min(range.length, unit * (units * i / parts));
  };
  return {range.offset + at(part), at(part + 1) - at(part)};
}

// What one batch takes of a target: of each replica's part the same of `count` stretches.
struct Portion {
  Target whole;
  std::int64_t width = 0;  // bytes a scalar
  bool shared = false;
  int index = 0;
  int count = 1;

  [[nodiscard]] Target of(int replica, int replicas) const {
    if (!shared) return whole;
    Target part = whole;
    part.range = cut(cut(whole.range, replica, replicas), index, count);
    part.data += (part.range.offset - whole.range.offset) * width;
    return part;
  }
};

using Batch = std::vector<Portion>;

// The same on all replicas, and in the order in which a piece holds the arrays.
std::vector<Batch> make_batches(const StoredState& target, const layout::Place& place,
                                std::span<const Target> targets, bool may_share,
                                std::int64_t batch_bytes) {
  std::vector<std::size_t> order(targets.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    return std::tie(targets[a].array, targets[a].buffer, targets[a].range.offset) <
           std::tie(targets[b].array, targets[b].buffer, targets[b].range.offset);
  });
  std::vector<Batch> batches(1);
  std::int64_t bytes = 0;  // of the last batch, to be sent
  for (const std::size_t t : order) {
    const Target& to = targets[t];
    Portion portion{.whole = to};
    portion.width =
        bytes_of(target.buffer(to.buffer).arrays[static_cast<std::size_t>(to.array)].dtype);
    // A slice belongs to one replica alone.
    portion.shared = may_share && to.range == target.shard(to.buffer, place.shard);
    const std::int64_t all = to.range.length * portion.width;
    if (portion.shared) {
      portion.count = static_cast<int>(std::max<std::int64_t>(1, all / batch_bytes));
    }
    for (; portion.count > portion.index; ++portion.index) {
      if (bytes >= batch_bytes) {
        batches.emplace_back();
        bytes = 0;
      }
      batches.back().push_back(portion);
      if (portion.shared) bytes += all / portion.count;
    }
  }
  return batches;
}

// The batches that are read, as one thread tells them and another waits for them.
class Progress {
 public:
  explicit Progress(std::size_t batches) : promises_(batches), missing_(batches) {
    for (std::promise<void>& promise : promises_) futures_.push_back(promise.get_future());
  }

  [[nodiscard]] std::future<void>& future(std::size_t batch) { return futures_[batch]; }
  void expect(std::size_t batch) { ++missing_[batch]; }
  void arrived(std::size_t batch) {
    if (--missing_[batch] == 0) promises_[batch].set_value();
  }
  // All that did not arrive will not.
  void fail(const std::exception_ptr& error) {
    for (std::size_t batch = 0; batch < promises_.size(); ++batch) {
      if (missing_[batch] > 0) promises_[batch].set_exception(error);
    }
  }

 private:
  std::vector<std::promise<void>> promises_;
  std::vector<std::future<void>> futures_;
  std::vector<std::int64_t> missing_;
};

}  // namespace

std::vector<ReadSum> read_shared(comm::MpiTransport& group, const Checkpoint& checkpoint,
                                 const StoredState& target, const layout::Place& place,
                                 std::span<const Target> targets, const Broadcast& broadcast,
                                 std::int64_t batch_bytes) {
  if (targets.empty()) return {};
  const int replicas = target.grid.replicas();
  const std::vector<Batch> batches =
      make_batches(target, place, targets, broadcast && replicas > 1, batch_bytes);

  std::vector<Target> own;
  std::vector<std::size_t> batch_of;  // each of `own`
  Progress progress(batches.size());
  for (std::size_t b = 0; b < batches.size(); ++b) {
    for (const Portion& portion : batches[b]) {
      own.push_back(portion.of(place.group, replicas));
      batch_of.push_back(b);
      progress.expect(b);
    }
  }

  std::vector<ReadSum> sums;
  std::stop_source in_vain;  // another rank could not read, or is gone
  std::future<void> done;
  const auto read = [&] {
    try {
      sums = checkpoint
                 .read(
                     target, own, [&](std::size_t t) { progress.arrived(batch_of[t]); },
                     in_vain.get_token())
                 .sums;
    } catch (...) {
      progress.fail(std::current_exception());
    }
  };
  try {
    done = comm::on_helper_thread(read);
  } catch (...) {  // no thread: known to all when they meet
    progress.fail(std::current_exception());
  }
  try {
    for (std::size_t b = 0; b < batches.size(); ++b) {
      comm::wait_for_all(group, progress.future(b), reading);
      comm::agree(group, reading, [&] { progress.future(b).get(); });
      for (const Portion& portion : batches[b]) {
        if (!portion.shared) continue;
        for (int replica = 0; replica < replicas; ++replica) {
          const Target part = portion.of(replica, replicas);
          if (part.range.empty()) continue;
          broadcast(part.data, part.range.length * portion.width, replica);
        }
      }
    }
  } catch (...) {
    in_vain.request_stop();
    if (done.valid()) done.wait();
    throw;
  }
  done.wait();
  return sums;
}

}  // namespace mics::checkpoint::detail
