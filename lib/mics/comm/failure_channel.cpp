// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/failure_channel.hpp>

#include <algorithm>
#include <sstream>
#include <thread>
#include <utility>

namespace mics::comm {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int failure_tag = 1;
// Ranks that fail for one reason fail within this time, and then agree on whom they blame.
constexpr std::chrono::milliseconds settling_time{100};
// How long the others wait for the text of an exception that is unwinding on the failing rank.
constexpr std::chrono::milliseconds text_grace{2000};
// Small enough to be sent at once by every MPI, so that a sender which ends early has been heard.
constexpr std::size_t max_text_bytes = 2048;
// Of the ranks that an answer holds.
constexpr std::size_t max_named = 16;

constexpr char letter_of(FailureKind kind) {
  switch (kind) {
    case FailureKind::cause:
      return 'f';
    case FailureKind::text_follows:
      return 'u';
    case FailureKind::consequence:
      break;
  }
  return 'm';
}

}  // namespace

FailureChannel::FailureChannel(const Communicator& parent)
    : comm_(Communicator::duplicate(parent.native())) {}

FailureChannel::~FailureChannel() {
  if (failed()) comm_.abandon();
  // A message that is still under way stays where it is for the rest of the process.
  static auto* const kept = new std::list<Message>;
  for (auto message = sent_.begin(); message != sent_.end();) {
    const auto here = message++;
    int done = 0;
    MPI_Test(&here->request, &done, MPI_STATUS_IGNORE);
    if (done == 0) kept->splice(kept->end(), sent_, here);
  }
}

void FailureChannel::send(int peer, char kind, const std::string& text) noexcept {
  sent_.remove_if([](Message& message) {
    int done = 0;
    MPI_Test(&message.request, &done, MPI_STATUS_IGNORE);
    return done != 0;
  });
  Message& message = sent_.emplace_back();
  message.bytes = kind + text.substr(0, max_text_bytes);
  // A status that is not success means that the peer is gone, and nobody is left to tell.
  MPI_Isend(message.bytes.data(), static_cast<int>(message.bytes.size()), MPI_CHAR, peer,
            failure_tag, comm_.native(), &message.request);
}

void FailureChannel::note(int rank, FailureKind kind, std::string text) {
  const bool first = failures_.empty();
  if (first) first_failure_ = Clock::now();
  failures_[rank] = {kind, std::move(text)};
  if (first && on_failure_) on_failure_();
}

void FailureChannel::fail(const std::string& text, FailureKind kind) noexcept {
  const auto own = failures_.find(comm_.rank());
  const bool refines = own != failures_.end() && own->second.kind == FailureKind::text_follows &&
                       kind != FailureKind::text_follows;
  if (failed() && !refines) return;
  // Nobody knows more of it than the others.
  note(comm_.rank(), kind, text.substr(0, max_text_bytes));
  for (int step = 1; step < comm_.size(); ++step) {
    send((comm_.rank() + step) % comm_.size(), letter_of(kind), text);
  }
}

bool FailureChannel::receive() {
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
  const int from = status.MPI_SOURCE;
  std::string text = message.substr(1);
  switch (message[0]) {
    case 'q':
      send(from, 'a', own_answer());
      break;
    case 'a': {
      std::istringstream words(text);
      Answer answer;
      for (int rank = 0; words >> rank && rank >= 0;) answer.whom.push_back(rank);
      std::getline(words >> std::ws, answer.operation);
      answers_[from] = std::move(answer);
      break;
    }
    case 'u':
      note(from, FailureKind::text_follows, std::move(text));
      break;
    case 'm':
      note(from, FailureKind::consequence, std::move(text));
      break;
    default:
      note(from, FailureKind::cause, std::move(text));
  }
  return true;
}

std::map<int, FailureChannel::Failure>::const_iterator FailureChannel::blamed() const {
  const auto cause = std::find_if(failures_.begin(), failures_.end(), [](const auto& failure) {
    return failure.second.kind != FailureKind::consequence;
  });
  return cause != failures_.end() ? cause : failures_.begin();
}

// The ranks, -1 and the operation.
std::string FailureChannel::own_answer() const {
  std::string text;
  if (waiting_ != nullptr && whom_) {
    std::vector<int> whom = whom_();
    whom.resize(std::min(whom.size(), max_named));
    for (const int rank : whom) text += std::to_string(rank) + ' ';
  }
  return text + "-1 " + (waiting_ != nullptr ? waiting_->text() : "nothing");
}

const FailureChannel::Answer* FailureChannel::answer_of(int rank) const {
  const auto answer = answers_.find(rank);
  return answer == answers_.end() ? nullptr : &answer->second;
}

std::string FailureChannel::names(const std::vector<int>& ranks) {
  std::string text;
  for (std::size_t i = 0; i < std::min(ranks.size(), max_named); ++i) {
    text += (i == 0 ? "rank " : ", rank ") + std::to_string(ranks[i]);
  }
  if (ranks.size() <= max_named) return text;
  return text + " and " + std::to_string(ranks.size() - max_named) + " more";
}

std::string FailureChannel::answer_text(int rank) const {
  const Answer* const answer = answer_of(rank);
  std::string they = names({rank});
  if (answer == nullptr) return they + " is stopped, gone or busy outside mics";
  if (answer->operation == "nothing") return they + " waits for nothing in mics";
  they += " waits in " + answer->operation;
  if (!answer->whom.empty()) they += " for " + names(answer->whom);
  return they;
}

std::string FailureChannel::text() const {
  return failed() ? blamed()->second.text : std::string();
}

int FailureChannel::failed_rank() const noexcept { return failed() ? blamed()->first : -1; }

void FailureChannel::poll() {
  while (!failed()) {
    if (!receive()) return;
  }
  while (!settled_) {
    while (receive()) {
    }
    const bool text_follows = std::any_of(failures_.begin(), failures_.end(), [&](const auto& f) {
      return f.second.kind == FailureKind::text_follows && f.first != comm_.rank();
    });
    const auto limit = text_follows ? text_grace : settling_time;
    settled_ = Clock::now() - first_failure_ >= limit;
    if (!settled_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const auto failure = blamed();
  if (failure->first == comm_.rank()) throw CommError(failure->second.text);
  throw CommError("rank " + std::to_string(failure->first) + ": " + failure->second.text);
}

}  // namespace mics::comm
