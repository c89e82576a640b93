// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/error.hpp>

#include <mpi.h>

#include <source_location>
#include <string_view>

namespace mics::comm {

/// Throws CommError with MPI's own text if `status` is not MPI_SUCCESS.
void check(int status, std::string_view operation,
           std::source_location where = std::source_location::current());

/// Owns one MPI communicator, on which errors return instead of aborting (otherwise no check can
/// fire). Move-only.
///
/// Creation and destruction are collective over the communicator's ranks, as MPI's are.
class Communicator {
 public:
  Communicator() = default;
  /// A private copy of the caller's communicator, whose error handler stays as it was.
  /// Collective over `parent`; blocks.
  [[nodiscard]] static Communicator duplicate(MPI_Comm parent);
  /// One communicator per colour, ranks ordered by (key, rank). Collective over *this; blocks.
  [[nodiscard]] Communicator split(int color, int key) const;
  /// The ranks that share this rank's memory. Collective over *this; blocks.
  [[nodiscard]] Communicator split_by_node() const;

  Communicator(Communicator&& other) noexcept;
  Communicator& operator=(Communicator&& other) noexcept;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;
  /// Frees the communicator; does nothing for a moved-from one or after MPI_Finalize.
  ~Communicator();

  /// Forgets the communicator without freeing it, which would be collective: for the path on which
  /// the other ranks may be gone.
  void abandon() noexcept { handle_ = MPI_COMM_NULL; }

  [[nodiscard]] int rank() const noexcept { return rank_; }
  [[nodiscard]] int size() const noexcept { return size_; }
  [[nodiscard]] MPI_Comm native() const noexcept { return handle_; }

 private:
  explicit Communicator(MPI_Comm owned);

  MPI_Comm handle_ = MPI_COMM_NULL;
  int rank_ = 0;
  int size_ = 1;
};

}  // namespace mics::comm
