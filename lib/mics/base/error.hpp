// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <source_location>
#include <stdexcept>
#include <string>
#include <string_view>

namespace mics {

/// Root of everything that mics throws. `what()` is one line:
/// `file:line function: object: expected X, found Y; remedy`.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The caller passed something that does not fit: a shape, a dtype, a size, an identifier.
class ArgumentError : public Error {
 public:
  using Error::Error;
};

/// A configuration file or value is wrong.
class ConfigError : public Error {
 public:
  using Error::Error;
};

/// The call is right but not now: a lease after its end, a second reduce, a dead engine.
class StateError : public Error {
 public:
  using Error::Error;
};

/// Ranks disagree, a peer failed, or communication returned an error. The engine is dead
/// afterwards.
class CommError : public Error {
 public:
  using Error::Error;
};

/// The environment refused: a file that cannot be written, a disk that is full, a library's error.
class IoError : public Error {
 public:
  using Error::Error;
};

/// The device or its run-time library refused: no memory, a failed kernel, no device.
class DeviceError : public Error {
 public:
  using Error::Error;
};

/// Stored data are not what they should be: damaged, incomplete, of another kind or version.
class FormatError : public Error {
 public:
  using Error::Error;
};

/// The five parts of a message. Parts left empty are left out.
struct ErrorText {
  std::string object = {};    ///< what it is about, by name: `unit "block0"`
  std::string expected = {};  ///< what would have been right
  std::string found = {};     ///< what was there
  std::string remedy = {};    ///< what the reader can do
};

/// Joins the parts into the one-line form of `Error`.
[[nodiscard]] std::string format_error(const ErrorText& text, std::source_location where);

/// Throws `Exception` with the text and the caller's position.
template <class Exception>
[[noreturn]] void raise(const ErrorText& text,
                        std::source_location where = std::source_location::current()) {
  throw Exception(format_error(text, where));
}

/// `"name"` with quotes, for messages.
[[nodiscard]] std::string in_quotes(std::string_view name);

}  // namespace mics
