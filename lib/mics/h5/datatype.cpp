// SPDX-License-Identifier: Apache-2.0
#include <mics/h5/datatype.hpp>

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

namespace mics::h5 {
namespace {

static_assert(std::endian::native == std::endian::little,
              "bytes of memory are the bytes of files, which are little-endian");

constexpr std::string_view type = "a floating-point type";

// Sign on top, then the exponent, then the mantissa, as in IEEE 754.
Datatype small_float(std::size_t exponent_bits, std::size_t mantissa_bits, std::size_t bias) {
  Datatype result(H5Tcopy(H5T_IEEE_F32LE), "copy", type);
  check(H5Tset_fields(result.id(), exponent_bits + mantissa_bits, mantissa_bits, exponent_bits, 0,
                      mantissa_bits),
        "describe", type);
  check(H5Tset_size(result.id(), 2), "resize", type);
  check(H5Tset_ebias(result.id(), bias), "describe", type);
  return result;
}

Datatype real_type(DType dtype) {
  switch (dtype) {
    case DType::fp64:
      return {H5Tcopy(H5T_IEEE_F64LE), "copy", type};
    case DType::bf16:
      return small_float(8, 7, 127);
    case DType::fp16:
      return small_float(5, 10, 15);
    case DType::fp32:
      break;
  }
  return {H5Tcopy(H5T_IEEE_F32LE), "copy", type};
}

}  // namespace

Datatype file_type(DType dtype, bool complex) {
  Datatype part = real_type(dtype);
  if (!complex) return part;
  const auto bytes = static_cast<std::size_t>(bytes_of(dtype));
  Datatype pair(H5Tcreate(H5T_COMPOUND, 2 * bytes), "create", "a complex type");
  check(H5Tinsert(pair.id(), "r", 0, part.id()), "insert r into", "a complex type");
  check(H5Tinsert(pair.id(), "i", bytes, part.id()), "insert i into", "a complex type");
  return pair;
}

std::vector<std::byte> nan_element(DType dtype, bool complex) {
  const auto bytes = static_cast<std::size_t>(bytes_of(dtype));
  std::vector<std::byte> element(complex ? 2 * bytes : bytes);
  visit(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const T value(std::numeric_limits<float>::quiet_NaN());
    for (std::size_t at = 0; at < element.size(); at += bytes) {
      std::memcpy(element.data() + at, &value, bytes);
    }
  });
  return element;
}

}  // namespace mics::h5
