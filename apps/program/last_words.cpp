// SPDX-License-Identifier: Apache-2.0
#include <mics/base/hash.hpp>

#include <program/last_words.hpp>

#include <algorithm>
#include <thread>

namespace mics::apps {
namespace {

constexpr int tag = 1;

std::uint64_t hash_of(std::string_view text) {
  std::uint64_t hash = 0;
  for (const char c : text) hash = hash_combine(hash, static_cast<unsigned char>(c));
  return hash;
}

}  // namespace

LastWords::LastWords(MPI_Comm world)
    : comm_(comm::Communicator::duplicate(world)), peers_(static_cast<std::size_t>(comm_.size())) {}

LastWords::~LastWords() {
  if (said_count_ > 0) comm_.abandon();
}

bool LastWords::should_print(std::string_view text, Milliseconds limit) {
  const std::uint64_t hash = hash_of(text);
  tell(Kind::error, hash);
  const auto lower = peers_.begin() + comm_.rank();
  const auto has_same = [&](const Peer& peer) {
    return peer.first == Kind::error && peer.hash == hash;
  };
  bool is_told = false;
  wait(limit, [&] {
    is_told = std::any_of(peers_.begin(), lower, has_same);
    return is_told || std::all_of(peers_.begin(), lower,
                                  [](const Peer& peer) { return peer.first != Kind::silent; });
  });
  return !is_told;
}

void LastWords::heard() { tell(Kind::heard, 0); }

void LastWords::wait_for_others(Milliseconds limit) {
  tell(Kind::done, 0);
  wait(limit, [&] { return std::ranges::all_of(peers_, &Peer::is_done); });
}

void LastWords::tell(Kind kind, std::uint64_t hash) {
  Peer& own = peers_[static_cast<std::size_t>(comm_.rank())];
  if (kind == Kind::done) {
    own.is_done = true;
  } else {
    own.first = kind;
  }
  if (said_count_ == 2) return;
  Message& message = said_[said_count_++];
  message = {static_cast<std::uint64_t>(kind), hash};
  for (int step = 1; step < comm_.size(); ++step) {
    const int peer = (comm_.rank() + step) % comm_.size();
    // So small that MPI sends it at once; where it cannot, the peer is gone or will wait in vain
    // for at most its limit. The process ends soon: nobody waits for the request.
    MPI_Request request = MPI_REQUEST_NULL;
    if (MPI_Isend(&message, 2, MPI_UINT64_T, peer, tag, comm_.native(), &request) == MPI_SUCCESS) {
      MPI_Request_free(&request);
    }
  }
}

void LastWords::listen() {
  int arrived = 0;
  MPI_Status status;
  while (MPI_Iprobe(MPI_ANY_SOURCE, tag, comm_.native(), &arrived, &status) == MPI_SUCCESS &&
         arrived != 0) {
    Message message;
    if (MPI_Recv(&message, 2, MPI_UINT64_T, status.MPI_SOURCE, tag, comm_.native(),
                 MPI_STATUS_IGNORE) != MPI_SUCCESS) {
      return;
    }
    Peer& peer = peers_[static_cast<std::size_t>(status.MPI_SOURCE)];
    const auto kind = static_cast<Kind>(message.kind);
    if (kind == Kind::done) {
      peer.is_done = true;
    } else {
      peer.first = kind;
      peer.hash = message.hash;
    }
  }
}

template <class Ready>
void LastWords::wait(Milliseconds limit, const Ready& ready) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (;;) {
    listen();
    if (ready() || std::chrono::steady_clock::now() >= deadline) return;
    std::this_thread::sleep_for(Milliseconds(1));
  }
}

}  // namespace mics::apps
