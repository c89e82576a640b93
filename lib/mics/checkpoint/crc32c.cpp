// SPDX-License-Identifier: Apache-2.0
#include <mics/checkpoint/crc32c.hpp>

#include <isa-l/crc.h>

#include <algorithm>
#include <array>

namespace mics::checkpoint {
namespace {

// Polynomials over GF(2) modulo the Castagnoli polynomial, the coefficient of x^0 in the top bit,
// as the CRC itself has it.
constexpr std::uint32_t polynomial = 0x82F63B78U;
constexpr std::uint32_t one = 0x80000000U;

constexpr std::uint32_t times_x(std::uint32_t a) {
  return (a >> 1) ^ ((a & 1U) != 0 ? polynomial : 0U);
}

constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
  std::uint32_t product = 0;
  for (std::uint32_t bit = one; bit != 0; bit >>= 1) {
    if ((a & bit) != 0) product ^= b;
    b = times_x(b);
  }
  return product;
}

// Entry k is x^(8 * 2^k): what 2^k further bytes multiply a CRC with.
constexpr std::array<std::uint32_t, 63> make_powers() {
  std::array<std::uint32_t, 63> powers{};
  std::uint32_t power = one;
  for (int i = 0; i < 8; ++i) power = times_x(power);
  for (std::uint32_t& entry : powers) {
    entry = power;
    power = multiply(power, power);
  }
  return powers;
}
constexpr auto powers = make_powers();

constexpr std::uint32_t after(std::uint32_t crc, std::int64_t bytes) {
  for (std::size_t k = 0; bytes != 0; ++k, bytes >>= 1) {
    if ((bytes & 1) != 0) crc = multiply(crc, powers[k]);
  }
  return crc;
}

}  // namespace

std::uint32_t crc32c(std::span<const std::byte> bytes, std::uint32_t before) {
  // ISA-L counts in int and leaves both inversions to its caller.
  constexpr std::size_t most = std::size_t{1} << 30;
  std::uint32_t state = ~before;
  while (!bytes.empty()) {
    const auto part = bytes.first(std::min(bytes.size(), most));
    // Its signature forgets that it only reads.
    auto* const data = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(part.data()));
    state = crc32_iscsi(data, static_cast<int>(part.size()), state);
    bytes = bytes.subspan(part.size());
  }
  return ~state;
}

std::uint32_t crc32c_combine(std::uint32_t first, std::uint32_t second, std::int64_t second_bytes) {
  return after(first, second_bytes) ^ second;
}

std::uint32_t crc32c_of_zeros(std::int64_t bytes) { return ~after(~0U, bytes); }

}  // namespace mics::checkpoint
