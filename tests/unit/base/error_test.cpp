// SPDX-License-Identifier: Apache-2.0
#include <mics/base/dtype.hpp>
#include <mics/base/error.hpp>

#include <gtest/gtest.h>

#include <string>

namespace mics {
namespace {

template <class Exception>
std::string text_of(const ErrorText& text) {
  try {
    raise<Exception>(text);
  } catch (const Exception& error) {
    return error.what();
  }
}

TEST(ErrorTest, IsOneLineWithPlaceObjectValuesAndRemedy) {
  const std::string line = text_of<ArgumentError>(
      {.object = "thing \"a\"", .expected = "2", .found = "3\n4", .remedy = "count again"});

  EXPECT_EQ(line.find('\n'), std::string::npos);
  EXPECT_TRUE(line.starts_with("error_test.cpp:")) << line;
  EXPECT_TRUE(line.ends_with(" text_of: thing \"a\": expected 2, found 3 4; count again")) << line;
}

TEST(ErrorTest, LeavesOutWhatIsNotSaid) {
  EXPECT_TRUE(text_of<StateError>({.object = "x", .found = "y"}).ends_with(": x: found y"));
  EXPECT_TRUE(text_of<CommError>({.object = "x", .expected = "y"}).ends_with(": x: expected y"));
}

TEST(DTypeTest, NamesParseToThemselves) {
  for (const DType dtype : {DType::fp64, DType::fp32, DType::bf16, DType::fp16}) {
    EXPECT_EQ(parse_dtype(name(dtype), "key"), dtype);
    EXPECT_EQ(visit(dtype, [](auto tag) { return sizeof(typename decltype(tag)::type); }),
              static_cast<std::size_t>(bytes_of(dtype)));
    EXPECT_EQ(visit(dtype, [](auto tag) { return dtype_of<typename decltype(tag)::type>; }), dtype);
  }
}

TEST(DTypeTest, RefusesAnotherWordNamingTheKey) {
  try {
    static_cast<void>(parse_dtype("int8", "deck: engine.mics.compute_dtype"));
    FAIL();
  } catch (const ConfigError& error) {
    const std::string line = error.what();
    EXPECT_NE(line.find("deck: engine.mics.compute_dtype: expected fp64, fp32, bf16 or fp16, "
                        "found \"int8\""),
              std::string::npos)
        << line;
  }
}

}  // namespace
}  // namespace mics
