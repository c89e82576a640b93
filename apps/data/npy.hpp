// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace data {

/// How a token is stored, little endian.
enum class ElementType : std::uint8_t { uint8, uint16, uint32, int32, int64 };

[[nodiscard]] constexpr std::size_t size_of(ElementType type) {
  switch (type) {
    case ElementType::uint8:
      return 1;
    case ElementType::uint16:
      return 2;
    case ElementType::uint32:
    case ElementType::int32:
      return 4;
    case ElementType::int64:
      return 8;
  }
  return 0;
}

/// Where the elements of a one-dimensional NumPy array lie in its file.
struct NpyArray {
  ElementType type = ElementType::uint8;
  std::int64_t count = 0;
  std::size_t offset = 0;  ///< bytes before the first element
};

/// Reads the header of a .npy file (format versions 1 to 3, as numpy.lib.format describes them):
/// a Python dictionary of exactly `descr`, `fortran_order` and `shape`, which is parsed as that and
/// nothing else. Local.
///
/// Example: {'descr': '<u2', 'fortran_order': False, 'shape': (1000,), } describes 1000 uint16.
///
/// \param file  the whole file
/// \param name  of the file, for messages
/// \throws mics::ArgumentError for another format, big-endian or other elements, more or fewer than
///         one dimension, and a file longer or shorter than its header says
[[nodiscard]] NpyArray read_npy_header(std::span<const std::byte> file, const std::string& name);

}  // namespace data
