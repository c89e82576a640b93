// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/agreement.hpp>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <new>
#include <vector>

namespace mics::comm {
namespace {

enum class Kind : std::int32_t { other, argument, config, state, comm, memory, io, format, device };

Kind kind_of(const std::exception& error) {
  if (dynamic_cast<const ArgumentError*>(&error) != nullptr) return Kind::argument;
  if (dynamic_cast<const ConfigError*>(&error) != nullptr) return Kind::config;
  if (dynamic_cast<const StateError*>(&error) != nullptr) return Kind::state;
  if (dynamic_cast<const CommError*>(&error) != nullptr) return Kind::comm;
  if (dynamic_cast<const IoError*>(&error) != nullptr) return Kind::io;
  if (dynamic_cast<const FormatError*>(&error) != nullptr) return Kind::format;
  if (dynamic_cast<const DeviceError*>(&error) != nullptr) return Kind::device;
  if (dynamic_cast<const std::bad_alloc*>(&error) != nullptr) return Kind::memory;
  return Kind::other;
}

[[noreturn]] void throw_as(Kind kind, const std::string& text) {
  switch (kind) {
    case Kind::argument:
      throw ArgumentError(text);
    case Kind::config:
      throw ConfigError(text);
    case Kind::state:
      throw StateError(text);
    case Kind::comm:
      throw CommError(text);
    case Kind::io:
      throw IoError(text);
    case Kind::format:
      throw FormatError(text);
    case Kind::device:
      throw DeviceError(text);
    case Kind::memory:
    case Kind::other:
      break;
  }
  throw Error(text);
}

}  // namespace

namespace detail {

void agree_on(const Communicator& comm, std::exception_ptr local) {
  const std::int32_t mine = local ? comm.rank() : std::numeric_limits<std::int32_t>::max();
  std::int32_t lowest = 0;
  check(MPI_Allreduce(&mine, &lowest, 1, MPI_INT32_T, MPI_MIN, comm.native()), "agreement");
  if (lowest == std::numeric_limits<std::int32_t>::max()) return;

  // The text travels to all; the failing rank itself throws what it caught.
  std::string text;
  std::int32_t header[2] = {0, 0};
  if (comm.rank() == lowest) {
    try {
      std::rethrow_exception(local);
    } catch (const std::exception& error) {
      text = error.what();
      header[0] = static_cast<std::int32_t>(kind_of(error));
    } catch (...) {
      text = "an exception that is no std::exception";
    }
    header[1] = static_cast<std::int32_t>(text.size());
  }
  check(MPI_Bcast(header, 2, MPI_INT32_T, lowest, comm.native()), "agreement");
  text.resize(static_cast<std::size_t>(header[1]));
  check(MPI_Bcast(text.data(), header[1], MPI_CHAR, lowest, comm.native()), "agreement");
  if (comm.rank() == lowest) std::rethrow_exception(local);
  throw_as(static_cast<Kind>(header[0]), text);
}

}  // namespace detail

void require_same(const Communicator& comm, std::string_view bytes, std::string_view what) {
  auto length = static_cast<std::int64_t>(bytes.size());
  check(MPI_Bcast(&length, 1, MPI_INT64_T, 0, comm.native()), "require_same");
  std::vector<char> first(static_cast<std::size_t>(length));
  if (comm.rank() == 0) std::copy(bytes.begin(), bytes.end(), first.begin());
  check(MPI_Bcast(first.data(), static_cast<int>(length), MPI_CHAR, 0, comm.native()),
        "require_same");
  agree(comm, [&] {
    const std::string_view expected(first.data(), first.size());
    if (bytes == expected) return;
    const auto position = static_cast<std::size_t>(
        std::mismatch(bytes.begin(), bytes.end(), expected.begin(), expected.end()).first -
        bytes.begin());
    const auto excerpt = [&](std::string_view text) {
      const std::size_t begin = position < 12 ? 0 : position - 12;
      return in_quotes(text.substr(std::min(begin, text.size()), 32));
    };
    raise<ArgumentError>({.object = std::string(what),
                          .expected = "the same on every rank: " + excerpt(expected) + " as rank 0",
                          .found = excerpt(bytes) + " on rank " + std::to_string(comm.rank()),
                          .remedy = "give every rank the same input"});
  });
}

}  // namespace mics::comm
