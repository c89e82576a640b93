// SPDX-License-Identifier: Apache-2.0
#include <mics/base/device.hpp>
#include <mics/comm/detail/device_sum.hpp>
#include <mics/comm/detail/sum.hpp>
#include <mics/comm/device_sums.hpp>

#include <Kokkos_Core.hpp>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

namespace mics::comm::test {
namespace {

constexpr std::array dtypes{DType::fp64, DType::fp32, DType::bf16, DType::fp16};

/// Bytes of the device with a copy on the host.
class Mirrored {
 public:
  explicit Mirrored(std::int64_t bytes)
      : host_(static_cast<std::size_t>(bytes)), device_("test::Mirrored", host_.size()) {}
  [[nodiscard]] std::byte* host() { return host_.data(); }
  [[nodiscard]] std::byte* device() { return device_.data(); }
  void to_device() { device::copy({}, device_.data(), host_.data(), size()); }
  /// What the device holds.
  [[nodiscard]] std::vector<std::byte> read() const {
    std::vector<std::byte> bytes(host_.size());
    device::copy({}, bytes.data(), device_.data(), size());
    Execution().fence("test: the result is there");
    return bytes;
  }

 private:
  [[nodiscard]] std::int64_t size() const { return static_cast<std::int64_t>(host_.size()); }
  std::vector<std::byte> host_;
  Kokkos::View<std::byte*, device::MemorySpace> device_;
};

/// Element `i` of piece `r`: all magnitudes that the dtypes share, both signs, zeros of both signs,
/// subnormals of fp16, values that overflow it, and infinities.
double value_of(int r, std::int64_t i) {
  std::uint64_t x = static_cast<std::uint64_t>(i) * 0x9E3779B97F4A7C15ULL +
                    static_cast<std::uint64_t>(r) * 0xBF58476D1CE4E5B9ULL + 1;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ULL;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBULL;
  x ^= x >> 31;
  if (x % 97 == 0) return (x & 128) != 0 ? -0.0 : 0.0;
  if (x % 101 == 0 && r == 0) return std::numeric_limits<double>::infinity();
  const double mantissa = 1 + static_cast<double>(x >> 12) * 0x1p-52;
  const int exponent = static_cast<int>(x % 41) - 24;  // 2^-24 ... 2^16
  return ((x & 64) != 0 ? -mantissa : mantissa) * std::ldexp(1.0, exponent);
}

void fill(DType dtype, std::byte* to, int r, std::int64_t count) {
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    for (std::int64_t i = 0; i < count; ++i) {
      const T value = static_cast<T>(value_of(r, i));
      std::memcpy(to + i * static_cast<std::int64_t>(sizeof(T)), &value, sizeof(T));
    }
  });
}

/// Elements whose bits differ. What is no number has no bits of its own: devices and hosts make
/// others of infinity - infinity.
std::int64_t count_differences(DType dtype, const std::byte* a, const std::byte* b,
                               std::int64_t count) {
  return visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    std::int64_t differences = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      T x{};
      T y{};
      std::memcpy(&x, a + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
      std::memcpy(&y, b + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
      const bool both_nan =
          std::isnan(static_cast<double>(x)) && std::isnan(static_cast<double>(y));
      differences += both_nan || std::memcmp(&x, &y, sizeof(T)) == 0 ? 0 : 1;
    }
    return differences;
  });
}

struct Case {
  DType source;
  DType result;
  double factor;
  int size;
  int rank;
  std::int64_t count;
  SumMode mode;
  std::int64_t shift;  // elements that pieces and result begin after an aligned place
  [[nodiscard]] std::string text() const {
    return std::string(name(source)) + " into " + std::string(name(result)) + ", factor " +
           std::to_string(factor) + ", rank " + std::to_string(rank) + " of " +
           std::to_string(size) + ", " + std::to_string(count) + " elements, shifted by " +
           std::to_string(shift) + (mode == SumMode::add ? ", add" : ", assign");
  }
};

void expect_the_hosts_bits(const Case& c) {
  SCOPED_TRACE(c.text());
  const std::int64_t source_bytes = bytes_of(c.source);
  const std::int64_t result_bytes = bytes_of(c.result);
  const std::int64_t stride = detail::padded_count(c.count) + c.shift;
  Mirrored own((c.count + c.shift) * source_bytes);
  Mirrored others((c.size * stride + c.shift) * source_bytes);
  Mirrored result((c.count + c.shift) * result_bytes);
  std::vector<const void*> sources;
  for (int r = 0; r < c.size; ++r) {
    const std::int64_t slot = r < c.rank ? r : r - 1;
    std::byte* const piece = r == c.rank ? own.host() + c.shift * source_bytes
                                         : others.host() + (slot * stride + c.shift) * source_bytes;
    fill(c.source, piece, r, c.count);
    sources.push_back(piece);
  }
  fill(c.result, result.host(), 77, c.count + c.shift);
  own.to_device();
  others.to_device();
  result.to_device();

  detail::sum_on_device({},
                        {.own = own.device() + c.shift * source_bytes,
                         .others = others.device() + c.shift * source_bytes,
                         .stride = stride,
                         .rank = c.rank,
                         .size = c.size},
                        c.source, c.factor, result.device() + c.shift * result_bytes, c.result,
                        c.count, c.mode);
  detail::sum_in_order(sources, c.source, c.factor, result.host() + c.shift * result_bytes,
                       c.result, c.count, c.mode);

  const std::vector<std::byte> found = result.read();
  EXPECT_EQ(count_differences(c.result, found.data(), result.host(), c.count + c.shift), 0);
}

TEST(DeviceSum, HasTheBitsOfTheHostsInEveryPairOfDtypes) {
  for (const DType source : dtypes) {
    for (const DType result : dtypes) {
      for (const SumMode mode : {SumMode::assign, SumMode::add}) {
        expect_the_hosts_bits({source, result, 1, 3, 1, 1000, mode, 0});
      }
    }
  }
}

// Fails if a product and the sum after it are rounded once: 0.3 is no power of two.
TEST(DeviceSum, RoundsAProductBeforeItIsAdded) {
  for (const DType source : dtypes) {
    for (const DType result : dtypes) {
      expect_the_hosts_bits({source, result, 0.3, 1, 0, 1000, SumMode::add, 0});
      expect_the_hosts_bits({source, result, 0.3, 3, 0, 1000, SumMode::assign, 0});
    }
  }
}

TEST(DeviceSum, KnowsEveryPlaceOfTheOwnPiece) {
  for (int size = 1; size <= 5; ++size) {
    for (int rank = 0; rank < size; ++rank) {
      expect_the_hosts_bits({DType::bf16, DType::fp32, 1, size, rank, 130, SumMode::add, 0});
    }
  }
}

TEST(DeviceSum, TakesAnyCountAtAnyPlace) {
  for (const std::int64_t count : {0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 257}) {
    for (const std::int64_t shift : {0, 1, 3, 8}) {
      expect_the_hosts_bits({DType::bf16, DType::fp32, 1, 2, 1, count, SumMode::assign, shift});
      expect_the_hosts_bits({DType::fp32, DType::bf16, 1, 2, 0, count, SumMode::add, shift});
      expect_the_hosts_bits({DType::fp16, DType::fp16, 1, 2, 0, count, SumMode::assign, shift});
    }
  }
}

TEST(DeviceSum, ConvertsInPlaceWhereTheDtypeStays) {
  Mirrored data(1001 * 4);
  fill(DType::fp32, data.host(), 0, 1001);
  data.to_device();

  detail::convert_on_device({}, data.device(), DType::fp32, 0.3, data.device(), DType::fp32, 1001);
  detail::convert(data.host(), DType::fp32, 0.3, data.host(), DType::fp32, 1001);

  EXPECT_EQ(std::memcmp(data.read().data(), data.host(), 1001 * 4), 0);
}

TEST(Staging, HoldsWhatIsOnItsWay) {
  constexpr Reduction plain{.source = DType::bf16, .wire = DType::bf16, .result = DType::fp32};
  constexpr Reduction narrowed{.source = DType::fp32, .wire = DType::bf16, .result = DType::fp32};
  constexpr Reduction direct{};

  // The example in device_sums.hpp.
  EXPECT_EQ(reduce_scatter_staging_bytes(4, 1000, plain, DeviceSums::wire), 2048);
  EXPECT_EQ(reduce_scatter_staging_bytes(4, 1000, plain, DeviceSums::fp32), 3 * 2048);

  EXPECT_EQ(reduce_scatter_staging_bytes(4, 1000, direct, DeviceSums::wire), 0);
  EXPECT_EQ(reduce_scatter_staging_bytes(4, 1000, direct, DeviceSums::fp32), 3 * 4096);
  EXPECT_EQ(reduce_scatter_staging_bytes(4, 1000, narrowed, DeviceSums::wire), 8064);
  EXPECT_EQ(reduce_scatter_staging_bytes(4, 1000, narrowed, DeviceSums::fp32), 8064 + 3 * 2048);
  EXPECT_EQ(reduce_scatter_staging_bytes(1, 1000, narrowed, DeviceSums::fp32), 0);
  EXPECT_EQ(all_reduce_staging_bytes(4, 1000, direct, DeviceSums::wire), 0);
  EXPECT_EQ(all_reduce_staging_bytes(4, 1000, direct, DeviceSums::fp32), 3 * 256 * 4);
  EXPECT_EQ(all_reduce_staging_bytes(4, 1000, narrowed, DeviceSums::wire), 2048);
}

TEST(Staging, HoldsTheLargestPieceOfAnAllReduce) {
  for (int size = 1; size <= 9; ++size) {
    for (const std::int64_t count : {0, 1, 63, 64, 65, 1000, 4096, 70'001}) {
      SCOPED_TRACE(std::to_string(count) + " over " + std::to_string(size));
      std::int64_t next = 0;
      std::int64_t largest = 0;
      for (int rank = 0; rank < size; ++rank) {
        const detail::ElementRange piece = detail::all_reduce_piece(count, rank, size);
        EXPECT_EQ(piece.offset, next);
        next += piece.count;
        largest = std::max(largest, detail::padded_count(piece.count));
      }
      EXPECT_EQ(next, count);
      EXPECT_GE(all_reduce_staging_bytes(size, count, {}, DeviceSums::fp32),
                (size - 1) * largest * 4);
    }
  }
}

}  // namespace
}  // namespace mics::comm::test
