// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/file_system.hpp>

#include <filesystem>
#include <string>
#include <vector>

namespace mics::checkpoint {

/// Reads every byte of a committed step and says, one line each, what is wrong: files that are
/// damaged, cut short, missing, exchanged, another save's, or not part of the step. Empty: every
/// byte is as it was committed. Of a step that a job removes meanwhile all sorts of things are
/// wrong: StepWatch tells. Local; blocks. Memory: one buffer of 8 MiB and the manifest. Floor: the
/// disk's sequential reads. \throws IoError if the folder itself cannot be read
[[nodiscard]] std::vector<std::string> verify(SystemCalls& calls,
                                              const std::filesystem::path& folder);

}  // namespace mics::checkpoint
