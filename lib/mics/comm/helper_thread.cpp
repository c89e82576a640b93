// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/helper_thread.hpp>

#include <pthread.h>

namespace mics::comm {

void block_signals() noexcept {
  sigset_t signals;
  sigfillset(&signals);
  // What an instruction raises ends the process all the same; its handler may say where.
  for (const int number : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&signals, number);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}

}  // namespace mics::comm
