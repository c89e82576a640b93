// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace mics::test {

/// A folder of its own, removed at the end.
class DataFiles : public testing::Test {
 protected:
  void SetUp() override {
    const auto* test = testing::UnitTest::GetInstance()->current_test_info();
    folder = std::filesystem::temp_directory_path() /
             ("mics_" + std::string(test->test_suite_name()) + "_" + test->name() + "_" +
              std::to_string(getpid()));
    std::filesystem::create_directories(folder);
  }
  void TearDown() override { std::filesystem::remove_all(folder); }

  std::filesystem::path write(const std::string& name, const std::string& content) const {
    const std::filesystem::path path = folder / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  std::filesystem::path folder;
};

/// Numbers as the bytes of a file.
template <class T>
std::string raw(const std::vector<T>& values) {
  return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T)};
}

/// A .npy file with this dictionary and data.
inline std::string npy(const std::string& header, const std::string& data, int major = 1) {
  const std::string text = header + "\n";
  std::string file = "\x93NUMPY";
  file += static_cast<char>(major);
  file += '\0';
  for (int i = 0; i < (major == 1 ? 2 : 4); ++i) {
    file += static_cast<char>(text.size() >> (8 * i) & 255);
  }
  return file + text + data;
}

/// What an action throws, from the object on: without the place in the source.
std::string message_of(const auto& action) {
  try {
    action();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    const auto colon = text.find(": ");
    return colon == std::string::npos ? text : text.substr(colon + 2);
  }
  return "no exception";
}

}  // namespace mics::test
