// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <support/job.hpp>

#include <mpi.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

namespace mics::test {

/// A directory that all ranks of the job share, removed at the end. Collective over the job.
class SharedFolder {
 public:
  SharedFolder() {
    std::array<char, 256> path{};
    if (job_rank() == 0) {
      const std::string pattern =
          (std::filesystem::temp_directory_path() / "mics_checkpoint_XXXXXX").string();
      std::copy(pattern.begin(), pattern.end(), path.begin());
      if (mkdtemp(path.data()) == nullptr) path[0] = '\0';
    }
    MPI_Bcast(path.data(), static_cast<int>(path.size()), MPI_CHAR, 0, MPI_COMM_WORLD);
    path_ = path.data();
  }
  ~SharedFolder() {
    MPI_Barrier(MPI_COMM_WORLD);
    std::error_code ignored;
    if (job_rank() == 0) std::filesystem::remove_all(path_, ignored);
  }
  SharedFolder(const SharedFolder&) = delete;
  SharedFolder& operator=(const SharedFolder&) = delete;
  [[nodiscard]] std::string in(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

}  // namespace mics::test
