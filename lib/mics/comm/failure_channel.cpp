// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/failure_channel.hpp>

#include <chrono>
#include <thread>

namespace mics::comm {
namespace {

constexpr int failure_tag = 1;
// How long the others wait for the text of an exception that is unwinding on the failing rank.
constexpr std::chrono::milliseconds text_grace{2000};
// Small enough to be sent at once by every MPI, so that a sender which ends early has been heard.
constexpr std::size_t max_text_bytes = 1024;

}  // namespace

FailureChannel::FailureChannel(const Communicator& parent)
    : comm_(Communicator::duplicate(parent.native())) {}

FailureChannel::~FailureChannel() {
  if (!failed_) return;
  comm_.abandon();
  // A message that is still under way stays where it is for the rest of the process.
  static auto* const kept = new std::list<Message>;
  for (auto message = sent_.begin(); message != sent_.end();) {
    const auto here = message++;
    int done = 0;
    MPI_Testall(static_cast<int>(here->requests.size()), here->requests.data(), &done,
                MPI_STATUSES_IGNORE);
    if (done == 0) kept->splice(kept->end(), sent_, here);
  }
}

void FailureChannel::send_to_all(char kind, const std::string& text) noexcept {
  Message& message = sent_.emplace_back();
  message.bytes = kind + text.substr(0, max_text_bytes);
  for (int step = 1; step < comm_.size(); ++step) {
    const int peer = (comm_.rank() + step) % comm_.size();
    MPI_Request request = MPI_REQUEST_NULL;
    // A status that is not success means that the peer is gone, and nobody is left to tell.
    MPI_Isend(message.bytes.data(), static_cast<int>(message.bytes.size()), MPI_CHAR, peer,
              failure_tag, comm_.native(), &request);
    message.requests.push_back(request);
  }
  int done = 0;
  MPI_Testall(static_cast<int>(message.requests.size()), message.requests.data(), &done,
              MPI_STATUSES_IGNORE);
}

void FailureChannel::fail(const std::string& text, bool text_follows) noexcept {
  const bool refines = text_pending_ && !text_follows;
  if (failed_ && !refines) return;
  failed_ = true;
  text_pending_ = text_follows;
  failed_rank_ = comm_.rank();
  text_ = text;
  send_to_all(text_follows ? 'u' : 'f', text);
}

bool FailureChannel::receive(bool& text_follows) {
  int arrived = 0;
  MPI_Status status;
  check(MPI_Iprobe(MPI_ANY_SOURCE, failure_tag, comm_.native(), &arrived, &status), "MPI_Iprobe");
  if (arrived == 0) return false;
  int bytes = 0;
  check(MPI_Get_count(&status, MPI_CHAR, &bytes), "MPI_Get_count");
  std::string message(static_cast<std::size_t>(bytes), '\0');
  check(MPI_Recv(message.data(), bytes, MPI_CHAR, status.MPI_SOURCE, failure_tag, comm_.native(),
                 MPI_STATUS_IGNORE),
        "MPI_Recv");
  // The first failure is the cause, later ones mostly its consequences; only the same rank may
  // replace its own generic text.
  if (failed_rank_ == -1 || failed_rank_ == status.MPI_SOURCE) {
    failed_rank_ = status.MPI_SOURCE;
    text_ = message.substr(1);
    text_follows = message[0] == 'u';
  }
  failed_ = true;
  return true;
}

void FailureChannel::poll() {
  if (!failed_) {
    bool text_follows = false;
    if (!receive(text_follows)) return;
    const auto deadline = std::chrono::steady_clock::now() + text_grace;
    while (text_follows && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      receive(text_follows);
    }
  }
  if (failed_rank_ == comm_.rank()) throw CommError(text_);
  throw CommError("rank " + std::to_string(failed_rank_) + ": " + text_);
}

}  // namespace mics::comm
