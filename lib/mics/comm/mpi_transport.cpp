// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>
#include <mics/comm/detail/sum.hpp>
#include <mics/comm/detail/waiting.hpp>
#include <mics/comm/device_sums.hpp>
#include <mics/comm/mpi_transport.hpp>

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <numeric>
#include <set>
#include <string>
#include <thread>
#include <utility>

namespace mics::comm {
namespace {

using Clock = std::chrono::steady_clock;

// MPI counts are int; larger messages travel as several.
constexpr std::int64_t max_message_bytes = std::int64_t{1} << 30;
// A piece from one peer is summed while it is in cache and the next is under way.
constexpr std::int64_t max_chunk_bytes = std::int64_t{256} << 10;
constexpr std::int64_t min_chunk_bytes = std::int64_t{8} << 10;
constexpr std::int64_t max_staging_bytes = std::int64_t{32} << 20;
// A rank that has waited so long looks for messages that it does not expect.
constexpr std::chrono::milliseconds patience{50};
// A rank that has waited so long leaves its core to others between looks: what it waits for is a
// computation or a fault, not a message that is under way.
constexpr std::chrono::milliseconds long_wait{200};
constexpr std::chrono::microseconds nap{200};

std::byte* at(void* base, std::int64_t bytes) { return static_cast<std::byte*>(base) + bytes; }
const std::byte* at(const void* base, std::int64_t bytes) {
  return static_cast<const std::byte*>(base) + bytes;
}

}  // namespace

/// Messages of one operation that are under way and waited for together.
class MpiTransport::Requests {
 public:
  Requests(MpiTransport& transport, const Operation& operation, int tag)
      : transport_(transport), operation_(operation), tag_(tag) {}
  Requests(const Requests&) = delete;
  Requests& operator=(const Requests&) = delete;
  ~Requests() { cancel(); }

  void send(const void* data, std::int64_t bytes, int peer) {
    for (std::int64_t done = 0; done < bytes; done += max_message_bytes) {
      const auto part = static_cast<int>(std::min(max_message_bytes, bytes - done));
      MPI_Request& request = add(peer, -1);
      check(MPI_Isend(at(data, done), part, MPI_BYTE, peer, tag_, transport_.comm_.native(),
                      &request),
            "MPI_Isend");
    }
  }
  void receive(void* data, std::int64_t bytes, int peer) {
    for (std::int64_t done = 0; done < bytes; done += max_message_bytes) {
      const auto part = static_cast<int>(std::min(max_message_bytes, bytes - done));
      MPI_Request& request = add(peer, part);
      check(MPI_Irecv(at(data, done), part, MPI_BYTE, peer, tag_, transport_.comm_.native(),
                      &request),
            "MPI_Irecv");
    }
  }

  // Blocks the host until all messages have arrived and left.
  void wait() {
    if (requests_.empty()) return;
    statuses_.resize(requests_.size());
    FailureChannel& failures = *transport_.context_.failures;
    struct Waiting {
      FailureChannel& failures;
      ~Waiting() { failures.wait_for(nullptr); }
    } const waiting{failures};
    Clock::time_point started{};
    Clock::time_point next_look{};
    Clock::time_point last_check{};
    Clock::time_point asked{};
    for (int polls = 1;; ++polls) {
      int done = 0;
      const int status = MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done,
                                     statuses_.data());
      if (status != MPI_SUCCESS) failed(status);
      if (done != 0) break;
      if (polls % detail::polls_between_checks != 0) continue;
      failures.poll();
      const auto now = Clock::now();
      // While this process did not run itself, say because the scheduler suspended the whole job,
      // it cannot tell that others were late.
      if (started != Clock::time_point{} && now - last_check > detail::absence)
        started += now - last_check;
      last_check = now;
      if (started == Clock::time_point{}) {
        started = now;
        next_look = now + patience;
        failures.wait_for(&operation_, [this] { return missing_world_ranks(); });
      }
      if (now - started > long_wait) std::this_thread::sleep_for(nap);
      if (now < next_look) continue;
      next_look = now + patience;
      look_for_other_operations();
      const auto timeout = transport_.context_.timeout;
      if (now - started <= timeout * 3 / 4) continue;
      if (asked == Clock::time_point{}) asked = now;
      ask_what_they_wait_for();
      // Who asked late, because it did not run in time itself, waits for the answers all the same.
      if (now - started > timeout && now - asked >= timeout / 4) timed_out();
    }
    check_sizes();
    asked_.clear();
    requests_.clear();
    peers_.clear();
    expected_bytes_.clear();
  }

 private:
  MPI_Request& add(int peer, int expected_bytes) {
    peers_.push_back(peer);
    expected_bytes_.push_back(expected_bytes);
    return requests_.emplace_back(MPI_REQUEST_NULL);
  }

  [[nodiscard]] std::set<int> missing() const {
    std::set<int> peers;
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (requests_[i] != MPI_REQUEST_NULL) peers.insert(peers_[i]);
    }
    return peers;
  }
  [[nodiscard]] std::vector<int> missing_world_ranks() const {
    std::vector<int> ranks;
    for (const int peer : missing()) ranks.push_back(transport_.world_rank(peer));
    return ranks;
  }
  [[nodiscard]] std::string rank_name(int peer) const {
    return "rank " + std::to_string(transport_.world_rank(peer));
  }
  [[nodiscard]] std::string object() const {
    return operation_.text() + " on rank " + std::to_string(transport_.context_.failures->rank());
  }
  [[nodiscard]] std::string last_operations() const {
    return "last operations here: " + transport_.context_.log->tail(8);
  }

  [[noreturn]] void fail(const ErrorText& text, FailureKind kind = FailureKind::cause) {
    const std::string line = format_error(text, std::source_location::current());
    transport_.context_.failures->fail(line, kind);
    transport_.context_.failures->poll();  // throws
    throw CommError(line);
  }

  [[noreturn]] void failed(int status) {
    int cause = status;
    int peer = -1;
    if (status == MPI_ERR_IN_STATUS) {
      for (std::size_t i = 0; i < requests_.size(); ++i) {
        if (statuses_[i].MPI_ERROR == MPI_SUCCESS || statuses_[i].MPI_ERROR == MPI_ERR_PENDING) {
          continue;
        }
        cause = statuses_[i].MPI_ERROR;
        peer = peers_[i];
        break;
      }
    }
    std::array<char, MPI_MAX_ERROR_STRING> text{};
    int length = 0;
    MPI_Error_string(cause, text.data(), &length);
    fail({.object = object(),
          .expected = "a message from " + (peer < 0 ? std::string("its group") : rank_name(peer)),
          .found = in_quotes({text.data(), static_cast<std::size_t>(length)}),
          .remedy = last_operations()},
         FailureKind::consequence);
  }

  // A message with this operation's number and another fingerprint can never be received: its
  // sender does something else in this place.
  void look_for_other_operations() {
    for (const int peer : missing()) {
      int arrived = 0;
      MPI_Status status;
      check(MPI_Iprobe(peer, MPI_ANY_TAG, transport_.comm_.native(), &arrived, &status),
            "MPI_Iprobe");
      if (arrived == 0 || status.MPI_TAG == tag_) continue;
      if (((status.MPI_TAG ^ tag_) & (transport_.sequence_count_ - 1)) != 0) continue;
      const auto theirs =
          transport_.context_.log->find(transport_.fingerprint_of(status.MPI_TAG),
                                        static_cast<std::uint64_t>(transport_.fingerprint_mask_));
      fail({.object = object(),
            .expected = "the same operation on " + rank_name(peer),
            .found = theirs ? theirs->text() : "one that this rank has not done yet",
            .remedy = "make the same calls with the same units in the same order on all ranks; " +
                      last_operations()});
    }
  }

  // The ranks that are missing here, then those that they miss: who waits for nobody, or does not
  // answer, is where the trouble began.
  void ask_what_they_wait_for() {
    FailureChannel& failures = *transport_.context_.failures;
    const auto ask = [&](int rank) {
      if (asked_.size() >= detail::max_asked || rank == failures.rank()) return;
      if (std::find(asked_.begin(), asked_.end(), rank) != asked_.end()) return;
      asked_.push_back(rank);
      failures.ask(rank);
    };
    if (asked_.empty()) {
      for (const int rank : missing_world_ranks()) ask(rank);
    }
    for (std::size_t i = 0; i < asked_.size(); ++i) {
      const FailureChannel::Answer* const answer = failures.answer_of(asked_[i]);
      if (answer == nullptr) continue;
      for (const int rank : answer->whom) ask(rank);
    }
  }

  [[noreturn]] void timed_out() {
    std::string they;
    for (const int rank : asked_) {
      they += (they.empty() ? "" : ", ") + transport_.context_.failures->answer_text(rank);
    }
    fail({.object = object(),
          .expected = FailureChannel::names(missing_world_ranks()) + " within " +
                      std::to_string(transport_.context_.timeout.count()) + " ms",
          .found = "no message; " + they,
          .remedy = last_operations()},
         FailureKind::consequence);
  }

  void check_sizes() {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (expected_bytes_[i] < 0) continue;
      int bytes = 0;
      check(MPI_Get_count(&statuses_[i], MPI_BYTE, &bytes), "MPI_Get_count");
      if (bytes == expected_bytes_[i]) continue;
      fail({.object = object(),
            .expected = std::to_string(expected_bytes_[i]) + " bytes from " + rank_name(peers_[i]),
            .found = std::to_string(bytes),
            .remedy = "all ranks must open the same units in the same order"});
    }
  }

  // The failure path: nothing may arrive in memory that is about to be freed. What cannot be
  // cancelled at once stays under way, and the engine keeps its memory for it.
  void cancel() noexcept {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (requests_[i] == MPI_REQUEST_NULL) continue;
      if (expected_bytes_[i] >= 0) MPI_Cancel(&requests_[i]);
      int done = 0;
      MPI_Test(&requests_[i], &done, MPI_STATUS_IGNORE);
      if (done == 0) MPI_Request_free(&requests_[i]);
    }
  }

  MpiTransport& transport_;
  Operation operation_;
  int tag_;
  std::vector<MPI_Request> requests_;
  std::vector<MPI_Status> statuses_;
  std::vector<int> peers_;
  std::vector<int> expected_bytes_;  // -1 for sends
  std::vector<int> asked_;           // what they wait for: ranks of the engine
};

class MpiTransport::DirectGather final : public PendingCollective {
 public:
  DirectGather(MpiTransport& transport, const void* send, void* receive, std::int64_t bytes,
               const Operation& operation)
      : requests_(transport, operation, transport.next_tag(operation)),
        send_(send),
        own_(at(receive, transport.rank() * bytes)),
        bytes_(bytes) {
    const int size = transport.size();
    const int rank = transport.rank();
    for (int step = 1; step < size; ++step) {
      const int peer = (rank - step + size) % size;
      requests_.receive(at(receive, peer * bytes), bytes, peer);
    }
    for (int step = 1; step < size; ++step) {
      requests_.send(send, bytes, (rank + step) % size);
    }
  }
  // The own part is copied when the others' are there: ranks that share cores then start to read
  // each other's memory at once, which is 5 % faster at 4 MiB a rank than copying first.
  void wait(const Execution& /*exec*/) override {
    requests_.wait();
    if (own_ != send_ && bytes_ > 0) std::memcpy(own_, send_, static_cast<std::size_t>(bytes_));
    bytes_ = 0;
  }

 private:
  Requests requests_;
  const void* send_;
  std::byte* own_;
  std::int64_t bytes_;
};

class MpiTransport::RingGather final : public PendingCollective {
 public:
  RingGather(MpiTransport& transport, const void* send, void* receive, std::int64_t bytes,
             const Operation& operation)
      : transport_(transport),
        receive_(receive),
        bytes_(bytes),
        operation_(operation),
        tag_(transport.next_tag(operation)) {
    std::byte* own = at(receive, transport.rank() * bytes);
    if (own != send && bytes > 0) std::memcpy(own, send, static_cast<std::size_t>(bytes));
  }
  // A step needs the one before it, so the ring turns when its result is wanted.
  void wait(const Execution& /*exec*/) override {
    if (std::exchange(done_, true)) return;
    const std::vector<int>& ring = transport_.ring_;
    const auto size = static_cast<std::ptrdiff_t>(ring.size());
    const auto here = std::find(ring.begin(), ring.end(), transport_.rank()) - ring.begin();
    const auto member = [&](std::ptrdiff_t i) {
      return ring[static_cast<std::size_t>((i % size + size) % size)];
    };
    Requests requests(transport_, operation_, tag_);
    for (std::ptrdiff_t step = 0; step + 1 < size; ++step) {
      requests.receive(at(receive_, member(here - step - 1) * bytes_), bytes_, member(here - 1));
      requests.send(at(receive_, member(here - step) * bytes_), bytes_, member(here + 1));
      requests.wait();
    }
  }

 private:
  MpiTransport& transport_;
  void* receive_;
  std::int64_t bytes_;
  Operation operation_;
  int tag_;
  bool done_ = false;
};

MpiTransport::MpiTransport(Communicator comm, std::vector<int> node_of_member,
                           TransportContext context)
    : comm_(std::move(comm)), context_(context) {
  const std::set<int> nodes(node_of_member.begin(), node_of_member.end());
  if (nodes.size() > 1 && nodes.size() < node_of_member.size()) {
    ring_.resize(node_of_member.size());
    std::iota(ring_.begin(), ring_.end(), 0);
    std::stable_sort(ring_.begin(), ring_.end(), [&](int a, int b) {
      return node_of_member[static_cast<std::size_t>(a)] <
             node_of_member[static_cast<std::size_t>(b)];
    });
  }
  take_tags();
  name_members();
}

// A tag is a number in its low bits and a fingerprint of the operation above, so that messages of
// different operations are never taken for each other. MPI guarantees 15 bits and mostly has 31.
void MpiTransport::take_tags() {
  void* value = nullptr;
  int found = 0;
  check(MPI_Comm_get_attr(comm_.native(), MPI_TAG_UB, &value, &found), "MPI_Comm_get_attr");
  const unsigned largest = found != 0 ? static_cast<unsigned>(*static_cast<int*>(value)) : 32767U;
  const int bits = std::bit_width(largest + 1) - 1;
  const int sequence_bits = std::min(11, bits - 8);
  sequence_count_ = 1 << sequence_bits;
  fingerprint_mask_ = (1 << (bits - sequence_bits)) - 1;
}

// Ranks are named as the engine's caller knows them.
void MpiTransport::name_members() {
  MPI_Group here = MPI_GROUP_NULL;
  MPI_Group world = MPI_GROUP_NULL;
  check(MPI_Comm_group(comm_.native(), &here), "MPI_Comm_group");
  check(MPI_Comm_group(context_.failures->native(), &world), "MPI_Comm_group");
  std::vector<int> members(static_cast<std::size_t>(comm_.size()));
  std::iota(members.begin(), members.end(), 0);
  world_ranks_.resize(members.size());
  check(MPI_Group_translate_ranks(here, comm_.size(), members.data(), world, world_ranks_.data()),
        "MPI_Group_translate_ranks");
  MPI_Group_free(&here);
  MPI_Group_free(&world);
}

MpiTransport::~MpiTransport() {
  // Freeing is collective; after a failure the other ranks may be gone.
  if (context_.failures->failed()) comm_.abandon();
}

std::int64_t MpiTransport::staging_bytes(int size, bool converts) {
  if (size == 1) return 0;
  const std::int64_t slots = 2 * (static_cast<std::int64_t>(size) - 1);
  const std::int64_t chunk =
      std::clamp(max_staging_bytes / slots / 64 * 64, min_chunk_bytes, max_chunk_bytes);
  // What is converted on its way out waits in as many slots, and the own part in two.
  return (converts ? 2 * slots + 2 : slots) * chunk;
}

std::int64_t MpiTransport::chunk_bytes() const {
  return staging_bytes(comm_.size(), false) / (2 * (comm_.size() - 1));
}

int MpiTransport::next_tag(const Operation& operation) {
  const std::uint64_t fingerprint = operation.fingerprint();
  history_ = hash_combine(history_, fingerprint);
  sequence_ = (sequence_ + 1) % sequence_count_;
  return static_cast<int>(fingerprint & static_cast<std::uint64_t>(fingerprint_mask_)) *
             sequence_count_ +
         sequence_;
}

std::unique_ptr<PendingCollective> MpiTransport::start_all_gather(const void* send, void* receive,
                                                                  std::int64_t bytes,
                                                                  const Operation& operation,
                                                                  const Execution& exec) {
  // A failure of another rank shows in the wait: looking for one here would cost as much again as
  // starting a small gather.
  exec.fence("mics::comm: the shard is ready before it is sent");
  if (ring_.empty()) {
    return std::make_unique<DirectGather>(*this, send, receive, bytes, operation);
  }
  return std::make_unique<RingGather>(*this, send, receive, bytes, operation);
}

void MpiTransport::exchange_and_sum(const void* send, void* result, const Reduction& reduction,
                                    std::span<const Piece> pieces, const Operation& operation) {
  context_.failures->poll();
  const int size = comm_.size();
  const int rank = comm_.rank();
  const Piece mine = pieces[static_cast<std::size_t>(rank)];
  if (size == 1) {
    const void* const sources[] = {at(send, mine.offset * bytes_of(reduction.source))};
    detail::sum_in_order(sources, reduction.source, reduction.factor, result, reduction.result,
                         mine.count, reduction.mode);
    return;
  }
  const bool converts = reduction.converts();
  // With the first reduction: most groups only gather.
  const auto needed = static_cast<std::size_t>(staging_bytes(size, converts));
  if (staging_.size() < needed) staging_.resize(needed);
  const std::int64_t wire_bytes = bytes_of(reduction.wire);
  const std::int64_t source_bytes = bytes_of(reduction.source);
  const std::int64_t chunk = chunk_bytes() / wire_bytes;
  std::int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.count);
  const std::int64_t chunks = (longest + chunk - 1) / chunk;
  const int tag = next_tag(operation);

  const auto part = [&](const Piece& piece, std::int64_t c) {
    const std::int64_t begin = std::min(piece.count, c * chunk);
    return Piece{piece.offset + begin, std::min(piece.count, (c + 1) * chunk) - begin};
  };
  // Two sets of staging slots: chunk c + 1 arrives while chunk c is summed.
  const auto slot = [&](std::int64_t c, int peer) {
    const std::int64_t index = (c % 2) * (size - 1) + (peer < rank ? peer : peer - 1);
    return staging_.data() + index * chunk * wire_bytes;
  };
  // What leaves, and with it what stays here, as it is or in the wire dtype.
  const auto outgoing = [&](std::int64_t c, int peer, const Piece& piece) -> const void* {
    const std::byte* source = at(send, piece.offset * source_bytes);
    if (!converts) return source;
    const std::int64_t index = 2 * (size - 1) + (c % 2) * size + peer;
    std::byte* target = staging_.data() + index * chunk * wire_bytes;
    detail::convert(source, reduction.source, reduction.factor, target, reduction.wire,
                    piece.count);
    return target;
  };
  Requests even(*this, operation, tag);
  Requests odd(*this, operation, tag);
  const auto post = [&](std::int64_t c) {
    Requests& requests = c % 2 == 0 ? even : odd;
    for (int step = 1; step < size; ++step) {
      const int from = (rank - step + size) % size;
      requests.receive(slot(c, from), part(mine, c).count * wire_bytes, from);
    }
    for (int step = 1; step < size; ++step) {
      const int to = (rank + step) % size;
      const Piece piece = part(pieces[static_cast<std::size_t>(to)], c);
      if (piece.count == 0) continue;
      requests.send(outgoing(c, to, piece), piece.count * wire_bytes, to);
    }
  };

  std::vector<const void*> sources(static_cast<std::size_t>(size));
  if (chunks > 0) post(0);
  for (std::int64_t c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) post(c + 1);
    (c % 2 == 0 ? even : odd).wait();
    const Piece here = part(mine, c);
    if (here.count == 0) continue;
    for (int peer = 0; peer < size; ++peer) {
      sources[static_cast<std::size_t>(peer)] =
          peer == rank ? outgoing(c, rank, here) : slot(c, peer);
    }
    detail::sum_in_order(sources, reduction.wire, 1,
                         at(result, (here.offset - mine.offset) * bytes_of(reduction.result)),
                         reduction.result, here.count, reduction.mode);
  }
}

void MpiTransport::reduce_scatter(const void* send, void* result, std::int64_t count,
                                  const Reduction& reduction, const Operation& operation,
                                  const Execution& exec) {
  exec.fence("mics::comm: gradients are ready before they are sent");
  std::vector<Piece> pieces(static_cast<std::size_t>(comm_.size()));
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    pieces[i] = {static_cast<std::int64_t>(i) * count, count};
  }
  exchange_and_sum(send, result, reduction, pieces, operation);
}

void MpiTransport::all_reduce(void* data, std::int64_t count, const Reduction& reduction,
                              const Operation& operation, const Execution& exec) {
  if (comm_.size() == 1 && reduction.factor == 1) return;
  exec.fence("mics::comm: sums are ready before they are sent");
  std::vector<Piece> pieces(static_cast<std::size_t>(comm_.size()));
  for (int i = 0; i < comm_.size(); ++i) {
    const detail::ElementRange range = detail::all_reduce_piece(count, i, comm_.size());
    pieces[static_cast<std::size_t>(i)] = {range.offset, range.count};
  }
  const Piece& mine = pieces[static_cast<std::size_t>(comm_.rank())];
  exchange_and_sum(data, at(data, mine.offset * bytes_of(reduction.result)), reduction, pieces,
                   operation);
  if (comm_.size() > 1) share_pieces(data, reduction, pieces, operation);
}

// Each element was summed by one rank; its bits go to all.
void MpiTransport::share_pieces(void* data, const Reduction& reduction,
                                std::span<const Piece> pieces, const Operation& operation) {
  const int size = comm_.size();
  const int rank = comm_.rank();
  const Piece& mine = pieces[static_cast<std::size_t>(rank)];
  const std::int64_t bytes = bytes_of(reduction.result);
  const int tag = next_tag(operation);
  Requests requests(*this, operation, tag);
  if (reduction.wire == reduction.result) {
    for (int step = 1; step < size; ++step) {
      const int from = (rank - step + size) % size;
      const Piece& piece = pieces[static_cast<std::size_t>(from)];
      requests.receive(at(data, piece.offset * bytes), piece.count * bytes, from);
    }
    for (int step = 1; step < size; ++step) {
      requests.send(at(data, mine.offset * bytes), mine.count * bytes, (rank + step) % size);
    }
    requests.wait();
    return;
  }
  const std::int64_t wire_bytes = bytes_of(reduction.wire);
  const std::int64_t chunk = chunk_bytes() / wire_bytes;
  std::int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.count);
  const auto slot = [&](int peer) { return staging_.data() + peer * chunk * wire_bytes; };
  for (std::int64_t begin = 0; begin < longest; begin += chunk) {
    const auto count = [&](const Piece& piece) {
      return std::clamp<std::int64_t>(piece.count - begin, 0, chunk);
    };
    for (int step = 1; step < size; ++step) {
      const int from = (rank - step + size) % size;
      requests.receive(slot(from), count(pieces[static_cast<std::size_t>(from)]) * wire_bytes,
                       from);
    }
    if (count(mine) > 0) {
      detail::convert(at(data, (mine.offset + begin) * bytes), reduction.result, 1, slot(rank),
                      reduction.wire, count(mine));
    }
    for (int step = 1; step < size; ++step) {
      requests.send(slot(rank), count(mine) * wire_bytes, (rank + step) % size);
    }
    requests.wait();
    for (int peer = 0; peer < size; ++peer) {
      const Piece& piece = pieces[static_cast<std::size_t>(peer)];
      if (count(piece) == 0) continue;
      detail::convert(slot(peer), reduction.wire, 1, at(data, (piece.offset + begin) * bytes),
                      reduction.result, count(piece));
    }
  }
}

void MpiTransport::all_gather_small(const void* send, void* receive, std::int64_t bytes,
                                    const Operation& operation) {
  context_.failures->poll();
  if (bytes == 0) return;
  const int size = comm_.size();
  const int rank = comm_.rank();
  // Bruck: after each round a rank holds twice as many blocks, its own first.
  std::vector<std::byte> blocks(static_cast<std::size_t>(bytes * size));
  std::memcpy(blocks.data(), send, static_cast<std::size_t>(bytes));
  Requests requests(*this, operation, next_tag(operation));
  for (int held = 1; held < size; held *= 2) {
    const std::int64_t moving = std::min(held, size - held) * bytes;
    requests.receive(blocks.data() + held * bytes, moving, (rank + held) % size);
    requests.send(blocks.data(), moving, (rank - held + size) % size);
    requests.wait();
  }
  for (int i = 0; i < size; ++i) {
    std::memcpy(at(receive, (rank + i) % size * bytes), blocks.data() + i * bytes,
                static_cast<std::size_t>(bytes));
  }
}

void MpiTransport::broadcast(void* data, std::int64_t bytes, int root, const Operation& operation) {
  context_.failures->poll();
  const int size = comm_.size();
  const int relative = (comm_.rank() - root + size) % size;
  Requests requests(*this, operation, next_tag(operation));
  // Binomial tree: a rank receives from the one without its lowest set bit, then serves higher
  // bits.
  int bit = 1;
  while (bit < size && (relative & bit) == 0) bit *= 2;
  if (relative != 0) {
    requests.receive(data, bytes, (relative - bit + root) % size);
    requests.wait();
  }
  for (int child = bit / 2; child > 0; child /= 2) {
    if (relative + child < size) requests.send(data, bytes, (relative + child + root) % size);
  }
  requests.wait();
}

std::vector<std::vector<std::byte>> MpiTransport::gather(std::span<const std::byte> mine, int root,
                                                         const Operation& operation) {
  const std::int64_t bytes = std::ssize(mine);
  std::vector<std::int64_t> sizes(static_cast<std::size_t>(comm_.size()));
  all_gather_small(&bytes, sizes.data(), sizeof(bytes), operation);
  Requests requests(*this, operation, next_tag(operation));
  std::vector<std::vector<std::byte>> all;
  if (comm_.rank() != root) {
    requests.send(mine.data(), bytes, root);
  } else {
    all.resize(sizes.size());
    for (int member = 0; member < comm_.size(); ++member) {
      std::vector<std::byte>& to = all[static_cast<std::size_t>(member)];
      if (member == root) {
        to.assign(mine.begin(), mine.end());
        continue;
      }
      to.resize(static_cast<std::size_t>(sizes[static_cast<std::size_t>(member)]));
      requests.receive(to.data(), std::ssize(to), member);
    }
  }
  requests.wait();
  return all;
}

void MpiTransport::barrier(const Operation& operation) {
  std::vector<std::byte> all(static_cast<std::size_t>(comm_.size()));
  const std::byte here{1};
  all_gather_small(&here, all.data(), 1, operation);
}

}  // namespace mics::comm
