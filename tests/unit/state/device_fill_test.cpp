// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/half.hpp>
#include <mics/state/checksum.hpp>
#include <mics/state/device_fill.hpp>
#include <support/device_array.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace mics::state {
namespace {

using test::DeviceArray;

template <class T>
void expect_cleared() {
  std::vector<T> expected(10'000, T(1.5F));
  const DeviceArray<T> values(expected);
  const std::vector<layout::Interval> ranges{{0, 1}, {5, 0}, {7, 3}, {4000, 3001}, {9999, 1}};
  const DeviceArray<layout::Interval> table(ranges);
  for (const layout::Interval& range : ranges) {
    for (std::int64_t i = range.offset; i < range.end(); ++i) {
      expected[static_cast<std::size_t>(i)] = T(0.0F);
    }
  }

  clear_ranges(Execution(), values.data(), sizeof(T), {table.data(), table.size()});

  EXPECT_TRUE(values.get() == expected);
}

TEST(DeviceFillTest, ClearsAllRangesAndNothingElse) {
  expect_cleared<double>();
  expect_cleared<float>();
  expect_cleared<bf16>();
  expect_cleared<fp16>();
}

TEST(DeviceFillTest, TakesATableWithoutRanges) {
  const std::vector<float> ones(3, 1.0F);
  const DeviceArray<float> values(ones);
  clear_ranges(Execution(), values.data(), 4, {});
  EXPECT_EQ(values.get(), ones);
}

TEST(DeviceFillTest, RefusesElementsOfAnotherSize) {
  const DeviceArray<layout::Interval> table({{0, 1}});
  try {
    clear_ranges(Execution(), nullptr, 3, {table.data(), 1});
    FAIL();
  } catch (const ArgumentError& error) {
    EXPECT_NE(std::string(error.what()).find("expected 2, 4 or 8 bytes, found 3"),
              std::string::npos)
        << error.what();
  }
}

template <class T>
void expect_poisoned() {
  const DeviceArray<T> values(std::vector<T>(1001, T(1.0F)));
  poison(Execution(), values.data(), dtype_of<T>, 1000);
  const std::vector<T> found = values.get();
  for (std::size_t i = 0; i < 1000; ++i) {
    ASSERT_TRUE(std::isnan(static_cast<double>(found[i]))) << i;
  }
  EXPECT_EQ(static_cast<double>(found[1000]), 1.0);
}

TEST(DeviceFillTest, PoisonsWhatItIsGiven) {
  expect_poisoned<double>();
  expect_poisoned<float>();
  expect_poisoned<bf16>();
  expect_poisoned<fp16>();
}

TEST(DeviceChecksumTest, TellsEveryBitApart) {
  // Two whole blocks, and one that ends with half a word and two bytes.
  const std::size_t bytes = 2 * static_cast<std::size_t>(checksum_block_bytes) + 1006;
  std::vector<unsigned char> data(bytes);
  for (std::size_t i = 0; i < bytes; ++i) data[i] = static_cast<unsigned char>(i * 37 + i / 1000);
  DeviceArray<unsigned char> values(data);
  const auto checksums = [&] {
    return block_checksums(Execution(), values.data(), static_cast<std::int64_t>(bytes));
  };
  const std::vector<std::uint64_t> before = checksums();
  ASSERT_EQ(before.size(), 3U);
  EXPECT_EQ(checksums(), before);

  for (const std::size_t at : {0UL, 7UL, 8UL, 2056UL, 1'048'575UL, 1'048'576UL, 2'000'000UL,
                               bytes - 1006, bytes - 7, bytes - 6, bytes - 1}) {
    for (const unsigned bit : {0U, 7U}) {
      data[at] ^= static_cast<unsigned char>(1U << bit);
      values.set(data);
      const std::vector<std::uint64_t> after = checksums();
      for (std::size_t block = 0; block < 3; ++block) {
        EXPECT_EQ(after[block] != before[block], block == at >> 20) << "byte " << at;
      }
      data[at] ^= static_cast<unsigned char>(1U << bit);
    }
  }
}

TEST(DeviceChecksumTest, TellsOrderAndLengthApart) {
  const auto of = [](const std::vector<double>& numbers) {
    const DeviceArray<double> values(numbers);
    return block_checksums(Execution(), values.data(),
                           static_cast<std::int64_t>(numbers.size()) * 8);
  };
  EXPECT_NE(of({1, 2}), of({2, 1}));
  EXPECT_NE(of({0.0}), of({-0.0}));
  std::vector<double> far(1000);
  far[0] = 1;
  const auto first = of(far);
  std::swap(far[0], far[256]);  // the same lane
  EXPECT_NE(of(far), first);
  EXPECT_TRUE(of({}).empty());
}

}  // namespace
}  // namespace mics::state
