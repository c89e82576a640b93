// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/state/initialize.hpp>
#include <support/device_array.hpp>

#include <gtest/gtest.h>

#include <complex>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

// The initial values of a device beside those of the host, which other tests compare with Init.

namespace mics::state {
namespace {

using test::DeviceArray;

// Every kind of initial value in every layout, with more elements than a part of the host's has.
Model varied_model(DType dtype) {
  Model model;
  const UnitId unit = model.unit("u");
  const auto add = [&](const char* name, std::vector<std::int64_t> shape, Init init,
                       MemoryLayout layout = MemoryLayout::right, bool complex = false) {
    (void)model.parameter(
        unit, name, std::move(shape),
        {.init = std::move(init), .dtype = dtype, .complex = complex, .layout = layout});
  };
  const auto wave = [](std::int64_t i) { return std::complex<double>(0.5 * i, -0.25 * i); };
  const auto line = [](std::int64_t i) { return 1e-3 * static_cast<double>(i % 1009); };
  add("normal", {3, 41, 67}, Init::normal(0.02));
  add("normal left", {5, 7, 11, 3}, Init::normal(2), MemoryLayout::left);
  add("uniform", {4099}, Init::uniform(-0.3, 0.7));
  add("uniform left", {17, 19}, Init::uniform(1, 3), MemoryLayout::left);
  add("constant", {1, 300}, Init::constant(-1.25));
  add("scalar", {}, Init::normal(1));
  add("nothing", {0, 5}, Init::normal(1));
  add("function", {1030, 1031}, Init::function(line));
  add("function left", {6, 9}, Init::function(line), MemoryLayout::left);
  if (dtype == DType::fp32 || dtype == DType::fp64) {
    add("complex normal", {9, 13}, Init::normal(1), MemoryLayout::left, true);
    add("complex uniform", {129}, Init::uniform(0, 1), MemoryLayout::right, true);
    add("complex ones", {33}, Init::ones(), MemoryLayout::right, true);
    add("complex function", {12, 5}, Init::complex_function(wave), MemoryLayout::left, true);
  }
  return model;
}

void expect_same_bits(const std::vector<std::byte>& host, const std::vector<std::byte>& device,
                      const std::string& what) {
  ASSERT_EQ(host.size(), device.size());
  for (std::size_t i = 0; i < host.size(); ++i) {
    ASSERT_EQ(host[i], device[i]) << what << ", byte " << i << " of " << host.size();
  }
}

void compare(DType dtype, DType master_dtype, int shards) {
  const Model model = varied_model(dtype);
  const FlatModel flat(model, DType::bf16, shards, 1, {});
  ASSERT_EQ(flat.buffer_count(), 1);
  const FlatBuffer& buffer = flat.buffer(0);
  for (int tau = 0; tau < shards; ++tau) {
    const layout::Interval shard = buffer.flat.shard(tau);
    // Of bytes that no value has, so that gaps show if they are written.
    const std::vector<std::byte> master(
        static_cast<std::size_t>(shard.length * bytes_of(master_dtype)), std::byte{0x5a});
    const std::vector<std::byte> compute(static_cast<std::size_t>(shard.length * bytes_of(dtype)),
                                         std::byte{0x5a});
    std::vector<std::byte> host_master = master;
    std::vector<std::byte> host_compute = compute;
    DeviceArray<std::byte> device_master(master);
    DeviceArray<std::byte> device_compute(compute);

    initialize(model, buffer, shard, 99, host_master.data(), master_dtype, host_compute.data());
    initialize(Execution(), model, buffer, shard, 99, device_master.data(), master_dtype,
               device_compute.data());

    const std::string what = std::string(name(dtype)) + ", shard " + std::to_string(tau) + " of " +
                             std::to_string(shards);
    expect_same_bits(host_master, device_master.get(), "master, " + what);
    expect_same_bits(host_compute, device_compute.get(), "compute, " + what);
    EXPECT_NE(host_master, master);
  }
}

TEST(InitializeTest, ADeviceHasTheBitsOfTheHost) {
  for (const int shards : {1, 3}) {
    compare(DType::bf16, DType::fp32, shards);
    compare(DType::fp16, DType::fp64, shards);
    compare(DType::fp32, DType::fp32, shards);
    compare(DType::fp64, DType::fp64, shards);
  }
}

TEST(InitializeTest, EitherMemoryMayBeAbsent) {
  const Model model = varied_model(DType::bf16);
  const FlatModel flat(model, DType::bf16, 1, 1, {});
  const FlatBuffer& buffer = flat.buffer(0);
  const layout::Interval all = buffer.flat.shard(0);
  const auto count = static_cast<std::size_t>(all.length);
  std::vector<float> master(count);
  std::vector<bf16> compute(count);
  initialize(model, buffer, all, 5, master.data(), DType::fp32, nullptr);
  initialize(model, buffer, all, 5, nullptr, DType::fp32, compute.data());
  const DeviceArray<float> device_master(std::vector<float>(count, 0.0F));
  const DeviceArray<bf16> device_compute(std::vector<bf16>(count, bf16(0.0F)));
  initialize(Execution(), model, buffer, all, 5, device_master.data(), DType::fp32, nullptr);
  initialize(Execution(), model, buffer, all, 5, nullptr, DType::fp32, device_compute.data());

  EXPECT_EQ(device_master.get(), master);
  EXPECT_EQ(device_compute.get(), compute);
  for (std::size_t i = 0; i < count; ++i) ASSERT_EQ(compute[i], bf16(master[i])) << i;
}

TEST(InitTest, RefusesAFunctionThatIsEmpty) {
  EXPECT_THROW((void)Init::function({}), ArgumentError);
  EXPECT_THROW((void)Init::complex_function({}), ArgumentError);
}

}  // namespace
}  // namespace mics::state
