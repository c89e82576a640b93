// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/base/random.hpp>
#include <mics/state/initialize.hpp>
#include <support/device_array.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <complex>
#include <cstdint>
#include <string>
#include <vector>

// The initial values of the host beside the formulas, those of a device beside the host's.

namespace mics::state {
namespace {

using test::DeviceArray;

double line(std::int64_t i) { return 1e-3 * static_cast<double>(i % 1009); }
std::complex<double> wave(std::int64_t i) {
  return {0.5 * static_cast<double>(i), -0.25 * static_cast<double>(i)};
}

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

// Element `position` of a column-major array of 2 or more extents, in row-major order.
std::int64_t row_major(const std::vector<std::int64_t>& shape, std::int64_t position) {
  std::vector<std::int64_t> index;
  for (const std::int64_t extent : shape) {
    index.push_back(position % extent);
    position /= extent;
  }
  std::int64_t result = 0;
  for (std::size_t d = 0; d < shape.size(); ++d) result = result * shape[d] + index[d];
  return result;
}

TEST(InitializeTest, EveryKindHasTheValuesOfItsFormulaAtItsElements) {
  const Model model = varied_model(DType::fp64);
  const FlatModel flat(model, DType::bf16, 1, 1, {});
  const FlatBuffer& buffer = flat.buffer(0);
  std::vector<double> values(static_cast<std::size_t>(buffer.flat.count()));
  initialize(model, buffer, buffer.flat.shard(0), 99, values.data(), DType::fp64, nullptr);

  int checked = 0;
  for (std::size_t p = 0; p < buffer.parameters.size(); ++p) {
    const ParameterSpec& spec = model.spec(buffer.parameters[p]);
    const layout::Interval place = buffer.flat.parameter(static_cast<std::int64_t>(p));
    const RandomStream stream{99, static_cast<std::uint64_t>(buffer.parameters[p].value)};
    const int parts = spec.options.complex ? 2 : 1;
    const bool left = spec.options.layout == MemoryLayout::left;
    ASSERT_EQ(place.length, spec.count * parts) << spec.name;
    for (std::int64_t i = 0; i < place.length; ++i) {
      const std::int64_t element = left ? row_major(spec.shape, i / parts) : i / parts;
      const auto part = static_cast<int>(i % parts);
      const auto number = static_cast<std::uint64_t>(element * parts + part);
      const double value = values[static_cast<std::size_t>(place.offset + i)];
      const std::string& name = spec.name;
      double expected = 0;
      if (name == "u/normal") expected = 0.02 * stream.normal(number);
      if (name == "u/normal left") expected = 2 * stream.normal(number);
      if (name == "u/uniform") expected = -0.3 + stream.uniform(number);
      if (name == "u/uniform left") expected = 1 + 2 * stream.uniform(number);
      if (name == "u/constant") expected = -1.25;
      if (name == "u/scalar") expected = stream.normal(0);
      if (name == "u/function" || name == "u/function left") expected = line(element);
      if (name == "u/complex normal") expected = std::sqrt(0.5) * stream.normal(number);
      if (name == "u/complex uniform") expected = stream.uniform(number);
      if (name == "u/complex ones") expected = part == 0 ? 1 : 0;
      if (name == "u/complex function") {
        expected = part == 0 ? wave(element).real() : wave(element).imag();
      }
      ASSERT_NEAR(value, expected, 1e-15 * (1 + std::abs(expected))) << name << ", scalar " << i;
      checked += expected != 0 ? 1 : 0;
    }
  }
  EXPECT_GT(checked, 1'060'000);
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
