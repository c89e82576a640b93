// SPDX-License-Identifier: Apache-2.0
#include <mics/comm/agreement.hpp>
#include <mics/comm/operation_log.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <tuple>
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

// What an exception says, and its class.
std::pair<std::string, Kind> description_of(const std::exception_ptr& failure) {
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    return {error.what(), kind_of(error)};
  } catch (...) {
    return {"an exception that is no std::exception", Kind::other};
  }
}

// Throws if the bytes of rank `rank` are not those of rank 0.
void compare(std::string_view bytes, std::string_view expected, int rank, std::string_view what) {
  if (bytes == expected) return;
  const auto position = static_cast<std::size_t>(
      std::mismatch(bytes.begin(), bytes.end(), expected.begin(), expected.end()).first -
      bytes.begin());
  // A name is shown as it is; of a long text, where it differs.
  constexpr std::size_t longest_name = 200;
  const auto excerpt = [&](std::string_view text) {
    if (std::max(bytes.size(), expected.size()) <= longest_name) return in_quotes(text);
    const std::size_t begin = position < 12 ? 0 : position - 12;
    return in_quotes(text.substr(std::min(begin, text.size()), 32));
  };
  raise<ArgumentError>({.object = std::string(what),
                        .expected = "the same on every rank: " + excerpt(expected) + " as rank 0",
                        .found = excerpt(bytes) + " on rank " + std::to_string(rank),
                        .remedy = "give every rank the same input"});
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
    Kind kind = Kind::other;
    std::tie(text, kind) = description_of(local);
    header[0] = static_cast<std::int32_t>(kind);
    header[1] = static_cast<std::int32_t>(text.size());
  }
  check(MPI_Bcast(header, 2, MPI_INT32_T, lowest, comm.native()), "agreement");
  text.resize(static_cast<std::size_t>(header[1]));
  check(MPI_Bcast(text.data(), header[1], MPI_CHAR, lowest, comm.native()), "agreement");
  if (comm.rank() == lowest) std::rethrow_exception(local);
  throw_as(static_cast<Kind>(header[0]), text);
}

void agree_on(Transport& group, std::string_view what, std::exception_ptr local) {
  const std::uint8_t failed = local ? 1 : 0;
  std::vector<std::uint8_t> all(static_cast<std::size_t>(group.size()));
  group.all_gather_small(&failed, all.data(), 1, {Purpose::agreement, what, 1});
  const auto lowest = std::find(all.begin(), all.end(), std::uint8_t{1}) - all.begin();
  if (lowest == std::ssize(all)) return;

  // The class, then the text.
  std::vector<std::byte> message;
  if (group.rank() == lowest) {
    const auto [text, kind] = description_of(local);
    message.resize(1 + text.size());
    message[0] = static_cast<std::byte>(kind);
    std::copy_n(reinterpret_cast<const std::byte*>(text.data()), text.size(), message.data() + 1);
  }
  broadcast(group, message, static_cast<int>(lowest), what);
  // Nobody leaves, and perhaps ends its engine over the error, before all ranks have its text. Who
  // is told so meanwhile has the text.
  try {
    group.all_gather_small(&failed, all.data(), 1, {Purpose::agreement, what, 1});
  } catch (const CommError&) {
  }
  if (group.rank() == lowest) std::rethrow_exception(local);
  throw_as(static_cast<Kind>(message[0]),
           {reinterpret_cast<const char*>(message.data()) + 1, message.size() - 1});
}

std::chrono::microseconds pause_before(int round) {
  // One part in twenty of what was waited already, so that short waits end soon, and at most what
  // costs a long one nothing.
  constexpr double shortest = 100;
  constexpr double longest = 3'000;
  return std::chrono::microseconds(static_cast<std::int64_t>(
      std::min(longest, shortest * std::pow(1.05, std::min(round, 1000)))));
}

}  // namespace detail

void broadcast(Transport& group, std::vector<std::byte>& bytes, int root, std::string_view what) {
  auto count = static_cast<std::int64_t>(bytes.size());
  group.broadcast(&count, sizeof(count), root, {Purpose::agreement, what, sizeof(count)});
  bytes.resize(static_cast<std::size_t>(count));
  group.broadcast(bytes.data(), count, root, {Purpose::agreement, what, count});
}

bool all_of(Transport& group, bool mine, std::string_view what) {
  const std::uint8_t here = mine ? 1 : 0;
  std::vector<std::uint8_t> all(static_cast<std::size_t>(group.size()));
  group.all_gather_small(&here, all.data(), 1, {Purpose::agreement, what, 1});
  return std::find(all.begin(), all.end(), std::uint8_t{0}) == all.end();
}

void require_same(const Communicator& comm, std::string_view bytes, std::string_view what) {
  auto length = static_cast<std::int64_t>(bytes.size());
  check(MPI_Bcast(&length, 1, MPI_INT64_T, 0, comm.native()), "require_same");
  std::vector<char> first(static_cast<std::size_t>(length));
  if (comm.rank() == 0) std::copy(bytes.begin(), bytes.end(), first.begin());
  check(MPI_Bcast(first.data(), static_cast<int>(length), MPI_CHAR, 0, comm.native()),
        "require_same");
  agree(comm, [&] { compare(bytes, {first.data(), first.size()}, comm.rank(), what); });
}

void require_same(Transport& group, std::string_view bytes, std::string_view what) {
  std::vector<std::byte> first;
  if (group.rank() == 0) {
    const auto* const begin = reinterpret_cast<const std::byte*>(bytes.data());
    first.assign(begin, begin + bytes.size());
  }
  broadcast(group, first, 0, what);
  agree(group, what, [&] {
    compare(bytes, {reinterpret_cast<const char*>(first.data()), first.size()}, group.rank(), what);
  });
}

}  // namespace mics::comm
