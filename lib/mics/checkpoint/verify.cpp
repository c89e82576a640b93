// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/checkpoint/commit.hpp>
#include <mics/checkpoint/crc32c.hpp>
#include <mics/checkpoint/detail/file_buffer.hpp>
#include <mics/checkpoint/directory.hpp>
#include <mics/checkpoint/reader.hpp>
#include <mics/checkpoint/verify.hpp>

#include <algorithm>

namespace mics::checkpoint {
namespace {

// Size and CRC of a file as it is.
CommittedFile measure(SystemCalls& calls, const std::filesystem::path& path,
                      std::span<std::byte> buffer) {
  const File file(calls, path, Access::read_direct);
  static_cast<void>(file.bytes());  // throws for what has no end
  CommittedFile found{path.filename().string(), 0, 0};
  while (true) {
    const std::int64_t bytes = file.read_some(buffer, found.bytes);
    found.crc = crc32c(buffer.first(static_cast<std::size_t>(bytes)), found.crc);
    found.bytes += bytes;
    if (bytes < std::ssize(buffer)) return found;
  }
}

std::string described(const CommittedFile& file) {
  return std::to_string(file.bytes) + " bytes with CRC-32C " + hex(file.crc);
}

}  // namespace

std::vector<std::string> verify(SystemCalls& calls, const std::filesystem::path& folder) {
  std::vector<std::string> problems;
  const auto add = [&](const std::string& object, const std::string& expected,
                       const std::string& found) {
    problems.push_back(object + ": expected " + expected + ", found " + found);
  };

  std::vector<std::string> present = entries_of(folder);
  std::sort(present.begin(), present.end());
  const auto is_present = [&](std::string_view name) {
    return std::binary_search(present.begin(), present.end(), name);
  };

  Commit commit;
  try {
    const std::filesystem::path path = folder / commit_name;
    const std::vector<std::byte> text = read_file(calls, path, std::int64_t{1} << 30);
    commit = parse_commit({reinterpret_cast<const char*>(text.data()), text.size()},
                          in_quotes(path.string()));
  } catch (const Error& damaged) {
    return {damaged.what()};
  }

  const auto number = parse_step_name(folder.filename().string());
  if (number && *number != commit.step) {
    add(std::string(commit_name), "step " + std::to_string(*number),
        "step " + std::to_string(commit.step));
  }

  constexpr std::size_t buffer_bytes = std::size_t{8} << 20;
  const detail::FileBuffer memory = detail::make_file_buffer(buffer_bytes);
  for (const CommittedFile& expected : commit.files) {
    if (!is_present(expected.name)) {
      add(expected.name, described(expected), "no such file");
      continue;
    }
    try {
      const CommittedFile found =
          measure(calls, folder / expected.name, {memory.get(), buffer_bytes});
      if (found == expected) continue;
      const auto twin =
          std::find_if(commit.files.begin(), commit.files.end(), [&](const CommittedFile& other) {
            return other.bytes == found.bytes && other.crc == found.crc;
          });
      add(expected.name, described(expected),
          described(found) +
              (twin == commit.files.end() ? "" : ", which is what " + twin->name + " holds"));
    } catch (const Error& unreadable) {
      problems.emplace_back(unreadable.what());
    }
  }
  for (const std::string& name : present) {
    const bool known =
        name == commit_name || std::any_of(commit.files.begin(), commit.files.end(),
                                           [&](const CommittedFile& f) { return f.name == name; });
    if (!known) add(name, "only files of save " + commit.id, "one that COMMIT does not name");
  }
  if (!problems.empty()) return problems;
  try {
    static_cast<void>(Checkpoint::open(calls, folder));
  } catch (const Error& inconsistent) {
    problems.emplace_back(inconsistent.what());
  }
  return problems;
}

}  // namespace mics::checkpoint
