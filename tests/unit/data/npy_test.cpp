// SPDX-License-Identifier: Apache-2.0
#include "data_files.hpp"

#include <data/npy.hpp>
#include <gtest/gtest.h>

#include <span>
#include <string>
#include <vector>

namespace {

using data::ElementType;
using mics::test::message_of;
using mics::test::npy;
using mics::test::raw;

data::NpyArray read(const std::string& file) {
  return data::read_npy_header(std::as_bytes(std::span(file)), "a.npy");
}

std::string refusal(const std::string& file) {
  return message_of([&] { static_cast<void>(read(file)); });
}

TEST(NpyTest, ReadsTheDocumentedExampleInAllVersions) {
  const std::string header = "{'descr': '<u2', 'fortran_order': False, 'shape': (1000,), }";
  const std::string data(2000, 'x');

  for (const int major : {1, 2, 3}) {
    const std::string file = npy(header + std::string(50, ' '), data, major);
    const auto array = read(file);
    EXPECT_EQ(array.type, ElementType::uint16);
    EXPECT_EQ(array.count, 1000);
    EXPECT_EQ(array.offset, file.size() - data.size());
  }
}

TEST(NpyTest, KnowsEachElementType) {
  const std::vector<std::pair<std::string, ElementType>> table = {{"|u1", ElementType::uint8},
                                                                  {"<u2", ElementType::uint16},
                                                                  {"<u4", ElementType::uint32},
                                                                  {"<i4", ElementType::int32},
                                                                  {"<i8", ElementType::int64}};
  for (const auto& [descr, type] : table) {
    const std::string data(3 * data::size_of(type), 'x');
    const auto array =
        read(npy("{\"shape\":(3,),'descr':'" + descr + "', 'fortran_order' : True}", data));
    EXPECT_EQ(array.type, type);
    EXPECT_EQ(array.count, 3);
  }
}

TEST(NpyTest, OtherElementsAreNamed) {
  const auto with = [](const std::string& descr) {
    return refusal(
        npy("{'descr': " + descr + ", 'fortran_order': False, 'shape': (1,), }", "1234"));
  };

  EXPECT_EQ(with("'>u2'"),
            "a.npy: expected elements |u1, <u2, <u4, <i4 or <i8, found >u2 (big endian); convert "
            "it, for example with .astype('<u2')");
  EXPECT_NE(with("'<f4'").find("found <f4;"), std::string::npos);
  EXPECT_NE(with("'<U1'").find("found <U1;"), std::string::npos);
  EXPECT_NE(with("'|O'").find("found |O;"), std::string::npos);
  EXPECT_NE(with("[('a', '<u2')]").find("found an array of records"), std::string::npos);
}

TEST(NpyTest, OtherShapesAreNamed) {
  const auto with = [](const std::string& order, const std::string& shape) {
    return refusal(
        npy("{'descr': '|u1', 'fortran_order': " + order + ", 'shape': " + shape + ", }", "1234"));
  };

  EXPECT_EQ(with("False", "(2, 2)"),
            "a.npy: expected one dimension, found 2; flatten it with .ravel()");
  EXPECT_EQ(with("True", "(2, 2)"),
            "a.npy: expected one dimension, found 2 in Fortran order; flatten it with .ravel()");
  EXPECT_NE(with("False", "()").find("expected one dimension, found 0"), std::string::npos);
  EXPECT_EQ(with("False", "(5,)"),
            "a.npy: expected 5 elements of 1 bytes after the header, found 4 bytes; the file was "
            "cut or has grown: save it again");
  EXPECT_NE(with("False", "(3,)").find("expected 3 elements"), std::string::npos);
  EXPECT_NE(with("False", "(9223372036854775807,)").find("expected 9223372036854775807 elements"),
            std::string::npos);
}

TEST(NpyTest, AHeaderThatIsNotExactlyADictionaryIsRefused) {
  const std::string good = "{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }";
  ASSERT_EQ(read(npy(good, "1234")).count, 4);
  for (const std::string bad :
       {"", "{}", "{'descr': '|u1', 'fortran_order': False}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4 4,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-4,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2**2,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999999999999,)}",
        "{'descr': '|u1', 'fortran_order': 0, 'shape': (4,)}",
        "{'descr': '|u1', 'descr': '|u1', 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4,), 'more': 1}",
        "{'descr': '|u1, 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '|u1' 'fortran_order': False, 'shape': (4,)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4,)} + x", "__import__('os')",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (4,)"}) {
    EXPECT_NE(refusal(npy(bad, "1234"))
                  .find("a.npy: expected a header of 'descr', 'fortran_order' and 'shape'"),
              std::string::npos)
        << bad;
  }
}

TEST(NpyTest, EveryCutOfAFileIsRefused) {
  const std::string file =
      npy("{'descr': '<u2', 'fortran_order': False, 'shape': (2,), }", raw<std::uint16_t>({1, 2}));
  for (std::size_t length = 0; length < file.size(); ++length) {
    EXPECT_NE(refusal(file.substr(0, length)), "no exception") << length;
  }
  EXPECT_NE(refusal(file + "x"), "no exception");
}

TEST(NpyTest, OtherFilesAndVersionsAreNamed) {
  EXPECT_NE(refusal("PK\3\4 and more of it").find("expected a NumPy array (.npy)"),
            std::string::npos);
  EXPECT_NE(refusal(npy("{}", "", 4)).find("version 1.0, 2.0 or 3.0, found 4.0"),
            std::string::npos);
  std::string long_header = npy("{}", "", 2);
  long_header[11] = '\x7f';  // the highest byte of its length
  EXPECT_NE(refusal(long_header).find("a header of at most 65536 bytes"), std::string::npos);
}

}  // namespace
