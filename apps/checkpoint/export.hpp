// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/checkpoint/reader.hpp>

#include <filesystem>
#include <string>

namespace mics::apps {

/// Writes one array of every tensor that has it as a safetensors file: whole, row-major, in the
/// dtype that it is stored in. A complex tensor, which the format lacks, becomes a real one with a
/// last extent of 2. Memory: 256 MiB, or twice the largest tensor. The file appears under its name
/// when it is complete.
/// \param array  "weights", or a name of the optimizer's
/// \return tensors written. \throws FormatError if no tensor has the array, or as Checkpoint::read;
///         IoError
int export_safetensors(const checkpoint::Checkpoint& checkpoint, const std::string& array,
                       const std::filesystem::path& file);

}  // namespace mics::apps
