// SPDX-License-Identifier: Apache-2.0
#include <train/stop_signal.hpp>

#include <csignal>

namespace mics::apps {
namespace {

volatile std::sig_atomic_t signal_came = 0;
using Handler = void (*)(int);
Handler former_term = SIG_DFL;
Handler former_user = SIG_DFL;

void notice(int /*signal*/) { signal_came = 1; }

}  // namespace

StopSignal::StopSignal() {
  signal_came = 0;
  former_term = std::signal(SIGTERM, notice);
  former_user = std::signal(SIGUSR1, notice);
}

StopSignal::~StopSignal() {
  std::signal(SIGTERM, came() ? SIG_IGN : former_term);
  std::signal(SIGUSR1, came() ? SIG_IGN : former_user);
}

bool StopSignal::came() const { return signal_came != 0; }

}  // namespace mics::apps
