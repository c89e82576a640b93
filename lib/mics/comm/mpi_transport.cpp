// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/detail/sum.hpp>
#include <mics/comm/mpi_transport.hpp>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <numeric>
#include <set>
#include <string>
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
// Looking for failures and at the clock costs about as much as looking for a message.
constexpr int polls_between_checks = 64;
// MPI guarantees tags up to 32767.
constexpr int tag_count = 32000;

std::byte* at(void* base, std::int64_t bytes) { return static_cast<std::byte*>(base) + bytes; }
const std::byte* at(const void* base, std::int64_t bytes) {
  return static_cast<const std::byte*>(base) + bytes;
}

}  // namespace

/// Messages under way that are waited for together.
class MpiTransport::Requests {
 public:
  explicit Requests(MpiTransport& transport) : transport_(transport) {}
  Requests(const Requests&) = delete;
  Requests& operator=(const Requests&) = delete;
  ~Requests() { cancel(); }

  void send(const void* data, std::int64_t bytes, int peer, int tag) {
    for (std::int64_t done = 0; done < bytes; done += max_message_bytes) {
      const auto part = static_cast<int>(std::min(max_message_bytes, bytes - done));
      MPI_Request& request = add(peer, -1);
      check(
          MPI_Isend(at(data, done), part, MPI_BYTE, peer, tag, transport_.comm_.native(), &request),
          "MPI_Isend");
    }
  }
  void receive(void* data, std::int64_t bytes, int peer, int tag) {
    for (std::int64_t done = 0; done < bytes; done += max_message_bytes) {
      const auto part = static_cast<int>(std::min(max_message_bytes, bytes - done));
      MPI_Request& request = add(peer, part);
      check(
          MPI_Irecv(at(data, done), part, MPI_BYTE, peer, tag, transport_.comm_.native(), &request),
          "MPI_Irecv");
    }
  }

  // Blocks the host until all messages have arrived and left.
  void wait(const Operation& operation) {
    if (requests_.empty()) return;
    statuses_.resize(requests_.size());
    Clock::time_point started{};
    for (int polls = 1;; ++polls) {
      int done = 0;
      const int status = MPI_Testall(static_cast<int>(requests_.size()), requests_.data(), &done,
                                     statuses_.data());
      if (status != MPI_SUCCESS) failed(status, operation);
      if (done != 0) break;
      if (polls % polls_between_checks != 0) continue;
      transport_.context_.failures->poll();
      const auto now = Clock::now();
      if (started == Clock::time_point{}) started = now;
      if (now - started > transport_.context_.timeout) timed_out(operation);
    }
    check_sizes(operation);
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

  [[nodiscard]] std::string describe(const Operation& operation) const {
    return std::string(name(operation.purpose)) + " of " + std::string(operation.object) + " (" +
           std::to_string(operation.bytes) + " bytes)";
  }

  [[noreturn]] void fail(const ErrorText& text) {
    const std::string line = format_error(text, std::source_location::current());
    transport_.context_.failures->fail(line);
    transport_.context_.failures->poll();  // throws
    throw CommError(line);
  }

  [[noreturn]] void failed(int status, const Operation& operation) {
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
    fail({.object = describe(operation),
          .expected =
              "a message of the same size from rank " + std::to_string(peer) + " of the group",
          .found = in_quotes({text.data(), static_cast<std::size_t>(length)}),
          .remedy = "all ranks must open the same units in the same order"});
  }

  [[noreturn]] void timed_out(const Operation& operation) {
    std::set<int> missing;
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (requests_[i] != MPI_REQUEST_NULL) missing.insert(peers_[i]);
    }
    std::string who;
    for (const int peer : missing) who += (who.empty() ? "" : ", ") + std::to_string(peer);
    fail({.object = describe(operation) + " on rank " +
                    std::to_string(transport_.context_.failures->rank()),
          .expected = "ranks " + who + " of the group of " + std::to_string(transport_.size()) +
                      " within " + std::to_string(transport_.context_.timeout.count()) + " ms",
          .found = "no message",
          .remedy = "last operations here: " + transport_.context_.log->tail(8)});
  }

  void check_sizes(const Operation& operation) {
    for (std::size_t i = 0; i < requests_.size(); ++i) {
      if (expected_bytes_[i] < 0) continue;
      int bytes = 0;
      check(MPI_Get_count(&statuses_[i], MPI_BYTE, &bytes), "MPI_Get_count");
      if (bytes == expected_bytes_[i]) continue;
      fail({.object = describe(operation),
            .expected = std::to_string(expected_bytes_[i]) + " bytes from rank " +
                        std::to_string(peers_[i]) + " of the group",
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
  std::vector<MPI_Request> requests_;
  std::vector<MPI_Status> statuses_;
  std::vector<int> peers_;
  std::vector<int> expected_bytes_;  // -1 for sends
};

class MpiTransport::DirectGather final : public PendingCollective {
 public:
  DirectGather(MpiTransport& transport, const void* send, void* receive, std::int64_t bytes,
               const Operation& operation)
      : requests_(transport), operation_(operation) {
    const int size = transport.size();
    const int rank = transport.rank();
    const int tag = transport.next_tag();
    for (int step = 1; step < size; ++step) {
      const int peer = (rank - step + size) % size;
      requests_.receive(at(receive, peer * bytes), bytes, peer, tag);
    }
    for (int step = 1; step < size; ++step) {
      requests_.send(send, bytes, (rank + step) % size, tag);
    }
    std::byte* own = at(receive, rank * bytes);
    if (own != send && bytes > 0) std::memcpy(own, send, static_cast<std::size_t>(bytes));
  }
  void wait(const Execution& /*exec*/) override { requests_.wait(operation_); }

 private:
  Requests requests_;
  Operation operation_;
};

class MpiTransport::RingGather final : public PendingCollective {
 public:
  RingGather(MpiTransport& transport, const void* send, void* receive, std::int64_t bytes,
             const Operation& operation)
      : transport_(transport),
        receive_(receive),
        bytes_(bytes),
        operation_(operation),
        tag_(transport.next_tag()) {
    std::byte* own = at(receive, transport.rank() * bytes);
    if (own != send && bytes > 0) std::memcpy(own, send, static_cast<std::size_t>(bytes));
  }
  // A step needs the one before it, so the ring turns when its result is wanted.
  void wait(const Execution& /*exec*/) override {
    const std::vector<int>& ring = transport_.ring_;
    const auto size = static_cast<std::ptrdiff_t>(ring.size());
    const auto here = std::find(ring.begin(), ring.end(), transport_.rank()) - ring.begin();
    const auto member = [&](std::ptrdiff_t i) {
      return ring[static_cast<std::size_t>((i % size + size) % size)];
    };
    Requests requests(transport_);
    for (std::ptrdiff_t step = 0; step + 1 < size; ++step) {
      requests.receive(at(receive_, member(here - step - 1) * bytes_), bytes_, member(here - 1),
                       tag_);
      requests.send(at(receive_, member(here - step) * bytes_), bytes_, member(here + 1), tag_);
      requests.wait(operation_);
    }
  }

 private:
  MpiTransport& transport_;
  void* receive_;
  std::int64_t bytes_;
  Operation operation_;
  int tag_;
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
}

MpiTransport::~MpiTransport() {
  // Freeing is collective; after a failure the other ranks may be gone.
  if (context_.failures->failed()) comm_.abandon();
}

std::int64_t MpiTransport::staging_bytes(int size) {
  if (size == 1) return 0;
  const std::int64_t slots = 2 * (static_cast<std::int64_t>(size) - 1);
  return slots * std::clamp(max_staging_bytes / slots / 64 * 64, min_chunk_bytes, max_chunk_bytes);
}

std::int64_t MpiTransport::chunk_bytes() const {
  return staging_bytes(comm_.size()) / (2 * (comm_.size() - 1));
}

int MpiTransport::next_tag() {
  sequence_ = (sequence_ + 1) % tag_count;
  return sequence_;
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

void MpiTransport::exchange_and_sum(const void* send, DType wire, void* result, DType result_type,
                                    std::span<const Piece> pieces, SumMode mode,
                                    const Operation& operation) {
  context_.failures->poll();
  const int size = comm_.size();
  const int rank = comm_.rank();
  // With the first reduction: most groups only gather.
  if (staging_.empty()) staging_.resize(static_cast<std::size_t>(staging_bytes(size)));
  const std::int64_t wire_bytes = bytes_of(wire);
  const Piece mine = pieces[static_cast<std::size_t>(rank)];
  const std::int64_t chunk =
      size == 1 ? std::max<std::int64_t>(1, mine.count) : chunk_bytes() / wire_bytes;
  std::int64_t longest = 0;
  for (const Piece& piece : pieces) longest = std::max(longest, piece.count);
  const std::int64_t chunks = (longest + chunk - 1) / chunk;
  const int tag = next_tag();

  const auto part = [&](const Piece& piece, std::int64_t c) {
    const std::int64_t begin = std::min(piece.count, c * chunk);
    return Piece{piece.offset + begin, std::min(piece.count, (c + 1) * chunk) - begin};
  };
  // Two sets of staging slots: chunk c + 1 arrives while chunk c is summed.
  const auto slot = [&](std::int64_t c, int peer) {
    const std::int64_t index = (c % 2) * (size - 1) + (peer < rank ? peer : peer - 1);
    return staging_.data() + index * chunk * wire_bytes;
  };
  Requests even(*this);
  Requests odd(*this);
  const auto post = [&](std::int64_t c) {
    Requests& requests = c % 2 == 0 ? even : odd;
    for (int step = 1; step < size; ++step) {
      const int from = (rank - step + size) % size;
      requests.receive(slot(c, from), part(mine, c).count * wire_bytes, from, tag);
    }
    for (int step = 1; step < size; ++step) {
      const int to = (rank + step) % size;
      const Piece piece = part(pieces[static_cast<std::size_t>(to)], c);
      requests.send(at(send, piece.offset * wire_bytes), piece.count * wire_bytes, to, tag);
    }
  };

  std::vector<const void*> sources(static_cast<std::size_t>(size));
  if (chunks > 0) post(0);
  for (std::int64_t c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) post(c + 1);
    (c % 2 == 0 ? even : odd).wait(operation);
    const Piece here = part(mine, c);
    for (int peer = 0; peer < size; ++peer) {
      sources[static_cast<std::size_t>(peer)] =
          peer == rank ? at(send, here.offset * wire_bytes) : slot(c, peer);
    }
    detail::sum_in_order(sources, wire,
                         at(result, (here.offset - mine.offset) * bytes_of(result_type)),
                         result_type, here.count, mode);
  }
}

void MpiTransport::reduce_scatter(const void* send, DType wire, void* result, DType result_type,
                                  std::int64_t count, SumMode mode, const Operation& operation,
                                  const Execution& exec) {
  exec.fence("mics::comm: gradients are ready before they are sent");
  std::vector<Piece> pieces(static_cast<std::size_t>(comm_.size()));
  for (std::size_t i = 0; i < pieces.size(); ++i) {
    pieces[i] = {static_cast<std::int64_t>(i) * count, count};
  }
  exchange_and_sum(send, wire, result, result_type, pieces, mode, operation);
}

void MpiTransport::all_reduce(void* data, DType dtype, std::int64_t count,
                              const Operation& operation, const Execution& exec) {
  if (comm_.size() == 1) return;
  exec.fence("mics::comm: sums are ready before they are sent");
  constexpr std::int64_t granule = 64;
  const std::int64_t bytes = bytes_of(dtype);
  const std::int64_t granules = (count + granule - 1) / granule;
  std::vector<Piece> pieces(static_cast<std::size_t>(comm_.size()));
  for (int i = 0; i < comm_.size(); ++i) {
    const std::int64_t begin = std::min(count, granules * i / comm_.size() * granule);
    const std::int64_t end = std::min(count, granules * (i + 1) / comm_.size() * granule);
    pieces[static_cast<std::size_t>(i)] = {begin, end - begin};
  }
  const Piece mine = pieces[static_cast<std::size_t>(comm_.rank())];
  void* own = at(data, mine.offset * bytes);
  exchange_and_sum(data, dtype, own, dtype, pieces, SumMode::assign, operation);

  // Each element was summed by one rank; its bits go to all.
  const int tag = next_tag();
  Requests requests(*this);
  for (int step = 1; step < comm_.size(); ++step) {
    const int from = (comm_.rank() - step + comm_.size()) % comm_.size();
    const Piece& piece = pieces[static_cast<std::size_t>(from)];
    requests.receive(at(data, piece.offset * bytes), piece.count * bytes, from, tag);
  }
  for (int step = 1; step < comm_.size(); ++step) {
    requests.send(own, mine.count * bytes, (comm_.rank() + step) % comm_.size(), tag);
  }
  requests.wait(operation);
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
  const int tag = next_tag();
  for (int held = 1; held < size; held *= 2) {
    const std::int64_t moving = std::min(held, size - held) * bytes;
    Requests requests(*this);
    requests.receive(blocks.data() + held * bytes, moving, (rank + held) % size, tag);
    requests.send(blocks.data(), moving, (rank - held + size) % size, tag);
    requests.wait(operation);
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
  const int tag = next_tag();
  // Binomial tree: a rank receives from the one without its lowest set bit, then serves higher
  // bits.
  int bit = 1;
  while (bit < size && (relative & bit) == 0) bit *= 2;
  if (relative != 0) {
    Requests requests(*this);
    requests.receive(data, bytes, (relative - bit + root) % size, tag);
    requests.wait(operation);
  }
  Requests requests(*this);
  for (int child = bit / 2; child > 0; child /= 2) {
    if (relative + child < size) requests.send(data, bytes, (relative + child + root) % size, tag);
  }
  requests.wait(operation);
}

void MpiTransport::barrier(const Operation& operation) {
  std::vector<std::byte> all(static_cast<std::size_t>(comm_.size()));
  const std::byte here{1};
  all_gather_small(&here, all.data(), 1, operation);
}

}  // namespace mics::comm
