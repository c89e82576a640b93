// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace mics::apps {

/// Notices SIGTERM and SIGUSR1, which batch schedulers send before a job's time is over, instead of
/// ending the process. One object in a process; the former handlers return with its end,
/// unless a signal came: more of them do not disturb a process that is about to end.
class StopSignal {
 public:
  StopSignal();
  ~StopSignal();
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;

  /// True once a signal has come to this rank. Local.
  [[nodiscard]] bool came() const;
};

}  // namespace mics::apps
