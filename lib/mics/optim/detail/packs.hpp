// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>

#include <Kokkos_Core.hpp>

#include <bit>
#include <cstddef>
#include <cstdint>

// Neighbouring elements that a thread of a device moves in accesses of 16 bytes, or in one where
// they are fewer.

namespace mics::optim::detail {

template <class T, int width>
struct alignas(sizeof(T) * width < 16 ? sizeof(T) * width : 16) Pack {
  T value[width];
};

/// True if packs of `width` elements can be moved to and from there.
[[nodiscard]] inline bool fits_packs(const void* data, DType dtype, int width) {
  const std::int64_t bytes = bytes_of(dtype) * width;
  const auto alignment = static_cast<std::uintptr_t>(bytes < 16 ? bytes : 16);
  return std::bit_cast<std::uintptr_t>(data) % alignment == 0;
}

template <class T, int width, class To>
KOKKOS_INLINE_FUNCTION void load_pack(const void* from, std::int64_t begin, To (&values)[width]) {
  const auto pack = *reinterpret_cast<const Pack<T, width>*>(static_cast<const T*>(from) + begin);
  for (int k = 0; k < width; ++k) values[k] = static_cast<To>(pack.value[k]);
}

template <class T, int width, class From>
KOKKOS_INLINE_FUNCTION void store_pack(void* to, std::int64_t begin, const From (&values)[width]) {
  Pack<T, width> pack;
  for (int k = 0; k < width; ++k) pack.value[k] = static_cast<T>(values[k]);
  *reinterpret_cast<Pack<T, width>*>(static_cast<T*>(to) + begin) = pack;
}

/// The same with a dtype that all threads of a kernel share.
template <int width, class To>
KOKKOS_INLINE_FUNCTION void load_pack(DType dtype, const void* from, std::int64_t begin,
                                      To (&values)[width]) {
  switch (dtype) {
    case DType::fp64:
      return load_pack<double>(from, begin, values);
    case DType::fp32:
      return load_pack<float>(from, begin, values);
    case DType::bf16:
      return load_pack<bf16>(from, begin, values);
    case DType::fp16:
      break;
  }
  load_pack<fp16>(from, begin, values);
}

template <int width, class From>
KOKKOS_INLINE_FUNCTION void store_pack(DType dtype, void* to, std::int64_t begin,
                                       const From (&values)[width]) {
  switch (dtype) {
    case DType::fp64:
      return store_pack<double>(to, begin, values);
    case DType::fp32:
      return store_pack<float>(to, begin, values);
    case DType::bf16:
      return store_pack<bf16>(to, begin, values);
    case DType::fp16:
      break;
  }
  store_pack<fp16>(to, begin, values);
}

}  // namespace mics::optim::detail
