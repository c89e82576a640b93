// SPDX-License-Identifier: Apache-2.0
#include <mics/checkpoint/crc32c.hpp>

#include <gtest/gtest.h>

#include <cstring>
#include <string_view>
#include <vector>

namespace mics::checkpoint {
namespace {

std::span<const std::byte> bytes(std::string_view text) {
  return std::as_bytes(std::span(text.data(), text.size()));
}

TEST(Crc32c, HasTheValuesOfRfc3720) {
  EXPECT_EQ(crc32c(bytes("123456789")), 0xE3069283U);
  EXPECT_EQ(crc32c(std::vector<std::byte>(32)), 0x8A9136AAU);
  EXPECT_EQ(crc32c({}), 0U);
}

TEST(Crc32c, OfPartsGivesTheWhole) {
  std::vector<std::byte> data(3000);
  for (std::size_t i = 0; i < data.size(); ++i) data[i] = std::byte(i * 7 % 251);
  const std::uint32_t whole = crc32c(data);
  for (const std::size_t cut : {0, 1, 7, 64, 1000, 2999, 3000}) {
    const auto first = std::span(data).first(cut);
    const auto second = std::span(data).subspan(cut);
    EXPECT_EQ(crc32c(second, crc32c(first)), whole);
    EXPECT_EQ(crc32c_combine(crc32c(first), crc32c(second), std::ssize(second)), whole);
  }
  EXPECT_EQ(crc32c_of_zeros(3000), crc32c(std::vector<std::byte>(3000)));
}

}  // namespace
}  // namespace mics::checkpoint
