// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/h5/datatype.hpp>
#include <mics/h5/file_builder.hpp>
#include <mics/h5/image_reader.hpp>

#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

namespace mics::h5 {
namespace {

std::vector<std::byte> whole(Skeleton skeleton) {
  skeleton.head.resize(static_cast<std::size_t>(skeleton.bytes));
  return std::move(skeleton.head);
}

TEST(FileBuilder, ElementsGoWhereItSays) {
  const Session session;
  FileBuilder builder("test.h5", 4096);
  const std::int64_t at = builder.create_bytes("/a/b/text", 5);
  std::vector<std::byte> bytes = whole(builder.finish());
  std::memcpy(bytes.data() + at, "hello", 5);
  const ImageReader reader("test.h5", bytes);
  const std::vector<std::byte> text = reader.read_bytes("/a/b/text");
  ASSERT_EQ(text.size(), 5U);
  EXPECT_EQ(std::memcmp(text.data(), "hello", 5), 0);
}

TEST(FileBuilder, AHugeDatasetTakesNoMemory) {
  const Session session;
  FileBuilder builder("huge.h5", 65536);
  const std::int64_t count = std::int64_t{1} << 42;
  const std::int64_t first =
      builder.create_dataset("/x/fp32", file_type(DType::fp32, false), std::span(&count, 1));
  const std::int64_t second =
      builder.create_dataset("/y/complex", file_type(DType::fp64, true), std::span(&count, 1));
  builder.attribute("/y/complex", "late", "an attribute after the elements");
  const Skeleton skeleton = builder.finish();
  EXPECT_EQ(first % 4096, 0);
  EXPECT_EQ(second % 4096, 0);
  EXPECT_EQ(std::abs(second - first) >= 4 * count, true);
  EXPECT_GE(skeleton.bytes, 20 * count);
  EXPECT_LE(skeleton.head.size(), 200000U);
  EXPECT_LE(std::ssize(skeleton.head), std::min(first, second) + 4096);
}

// Thousands of links and attributes change their storage while the file closes.
TEST(FileBuilder, ManyObjectsInOneGroup) {
  const Session session;
  FileBuilder builder("many.h5", 65536);
  constexpr int count = 5000;
  std::vector<std::int64_t> at;
  for (int i = 0; i < count; ++i) {
    const std::string path = "/group/d" + std::to_string(i);
    at.push_back(builder.create_bytes(path, 1));
    builder.attribute(path, "number", std::int64_t{i});
  }
  std::vector<std::byte> bytes = whole(builder.finish());
  for (int i = 0; i < count; ++i) {
    bytes[static_cast<std::size_t>(at[static_cast<std::size_t>(i)])] = std::byte(i % 251);
  }
  const ImageReader reader("many.h5", bytes);
  for (int i = 0; i < count; i += 97) {
    EXPECT_EQ(reader.read_bytes("/group/d" + std::to_string(i)).at(0), std::byte(i % 251));
  }
}

TEST(FileBuilder, NoElementsNoSpace) {
  const Session session;
  FileBuilder builder("none.h5", 4096);
  EXPECT_EQ(builder.create_bytes("/nothing", 0), 0);
  const std::vector<std::byte> bytes = whole(builder.finish());
  EXPECT_TRUE(ImageReader("none.h5", bytes).read_bytes("/nothing").empty());
}

TEST(FileBuilder, ErrorsCarryTheStackAndPrintNothing) {
  testing::internal::CaptureStderr();
  {
    const Session session;
    FileBuilder builder("twice.h5", 4096);
    static_cast<void>(builder.create_bytes("/a", 1));
    try {
      static_cast<void>(builder.create_bytes("/a", 1));
      FAIL();
    } catch (const IoError& error) {
      const std::string line = error.what();
      EXPECT_NE(line.find("/a: expected libhdf5 to create"), std::string::npos) << line;
      EXPECT_NE(line.find("exists"), std::string::npos) << line;
    }
  }
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

herr_t application_printer(hid_t, void*) { return 0; }

TEST(SessionTest, PutsTheApplicationsPrinterBack) {
  int data = 0;
  H5E_auto2_t before = nullptr;
  void* before_data = nullptr;
  H5Eget_auto2(H5E_DEFAULT, &before, &before_data);
  H5Eset_auto2(H5E_DEFAULT, application_printer, &data);
  {
    const Session outer;
    const Session inner;
  }
  H5E_auto2_t after = nullptr;
  void* after_data = nullptr;
  H5Eget_auto2(H5E_DEFAULT, &after, &after_data);
  H5Eset_auto2(H5E_DEFAULT, before, before_data);
  EXPECT_EQ(after, &application_printer);
  EXPECT_EQ(after_data, &data);
}

TEST(HandleTest, AMovedOneIsEmpty) {
  const Session session;
  Dataspace space(H5Screate(H5S_SCALAR), "create", "a space");
  const Dataspace moved(std::move(space));
  EXPECT_LT(space.id(), 0);  // NOLINT(bugprone-use-after-move)
  EXPECT_GE(moved.id(), 0);
}

TEST(ImageReaderTest, WhatIsNoFileIsRefused) {
  const Session session;
  const std::vector<std::byte> bytes(5000);
  EXPECT_THROW(ImageReader("noise.h5", bytes), IoError);
}

}  // namespace
}  // namespace mics::h5
