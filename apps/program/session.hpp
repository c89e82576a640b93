// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mpi.h>

#include <functional>

namespace mics::apps {

/// What the command line asked for.
struct Action {
  std::function<int()> run;  ///< returns the program's exit status
  int status_of_error = 1;   ///< the status where it throws
};

/// MPI and Kokkos for the program, from start() to the end of the object.
class Session {
 public:
  Session() = default;
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  /// Starts them. Where the environment says nothing, a rank computes with its share of the node's
  /// cores; where it says what cannot be read, the program ends with a line about it. So it does
  /// where a rank has not come after MICS_START_LIMIT seconds, a variable of the environment;
  /// without it 600. Once, before all that follows.
  void start(int& argc, char**& argv);

  [[nodiscard]] MPI_Comm world() const { return MPI_COMM_WORLD; }
  [[nodiscard]] int rank() const { return rank_; }
  [[nodiscard]] int size() const { return size_; }
  [[nodiscard]] bool is_root() const { return rank_ == 0; }

  /// The ranks of this job are no longer in step: ends the process with `status` without another
  /// collective, after everything printed has been written.
  [[noreturn]] void leave(int status) const;

 private:
  int rank_ = 0;
  int size_ = 1;
  bool started_ = false;
};

}  // namespace mics::apps
