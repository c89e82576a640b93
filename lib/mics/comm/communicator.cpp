// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/communicator.hpp>

#include <array>
#include <string>
#include <utility>

namespace mics::comm {

void check(int status, std::string_view operation, std::source_location where) {
  if (status == MPI_SUCCESS) return;
  std::array<char, MPI_MAX_ERROR_STRING> text{};
  int length = 0;
  MPI_Error_string(status, text.data(), &length);
  raise<CommError>({.object = std::string(operation),
                    .expected = "MPI_SUCCESS",
                    .found = in_quotes({text.data(), static_cast<std::size_t>(length)})},
                   where);
}

Communicator::Communicator(MPI_Comm owned) : handle_(owned) {
  // Duplicates inherit the parent's handler, which by default ends the program.
  check(MPI_Comm_set_errhandler(handle_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  check(MPI_Comm_rank(handle_, &rank_), "MPI_Comm_rank");
  check(MPI_Comm_size(handle_, &size_), "MPI_Comm_size");
}

Communicator Communicator::duplicate(MPI_Comm parent) {
  MPI_Comm copy = MPI_COMM_NULL;
  check(MPI_Comm_dup(parent, &copy), "MPI_Comm_dup");
  return Communicator(copy);
}

Communicator Communicator::split(int color, int key) const {
  MPI_Comm part = MPI_COMM_NULL;
  check(MPI_Comm_split(handle_, color, key, &part), "MPI_Comm_split");
  return Communicator(part);
}

Communicator Communicator::split_by_node() const {
  MPI_Comm node = MPI_COMM_NULL;
  check(MPI_Comm_split_type(handle_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node),
        "MPI_Comm_split_type");
  return Communicator(node);
}

Communicator::Communicator(Communicator&& other) noexcept
    : handle_(std::exchange(other.handle_, MPI_COMM_NULL)),
      rank_(std::exchange(other.rank_, 0)),
      size_(std::exchange(other.size_, 1)) {}

Communicator& Communicator::operator=(Communicator&& other) noexcept {
  Communicator moved(std::move(other));  // ends with what was here, and frees it now
  std::swap(handle_, moved.handle_);
  std::swap(rank_, moved.rank_);
  std::swap(size_, moved.size_);
  return *this;
}

Communicator::~Communicator() {
  if (handle_ == MPI_COMM_NULL) return;
  int finalized = 0;
  if (MPI_Finalized(&finalized) == MPI_SUCCESS && finalized == 0) MPI_Comm_free(&handle_);
}

}  // namespace mics::comm
