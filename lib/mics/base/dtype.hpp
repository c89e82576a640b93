// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/error.hpp>
#include <mics/base/half.hpp>

#include <cstdint>
#include <string_view>
#include <utility>

namespace mics {

/// Element types of parameters, gradients and optimizer state; a run-time value that a deck
/// chooses.
enum class DType : std::uint8_t { fp64, fp32, bf16, fp16 };

/// `fp64`, `fp32`, `bf16` or `fp16`.
[[nodiscard]] std::string_view name(DType dtype);

/// The dtype of that name; `float32`, `float`, `bfloat16` and the like are accepted.
/// \throws ConfigError for another word; `object` names the key it was read from.
[[nodiscard]] DType parse_dtype(std::string_view word, std::string_view object);

/// Bytes of one element.
[[nodiscard]] constexpr std::int64_t bytes_of(DType dtype) {
  switch (dtype) {
    case DType::fp64:
      return 8;
    case DType::fp32:
      return 4;
    case DType::bf16:
    case DType::fp16:
      return 2;
  }
  return 0;
}

/// Carries a type as a value: `visit(dtype, [](auto tag) { using T = typename decltype(tag)::type;
/// })`.
template <class T>
struct TypeTag {
  using type = T;
};

template <class T>
inline constexpr bool is_element_type = false;
template <class T>
inline constexpr DType dtype_of = DType::fp32;

#define MICS_ELEMENT_TYPE(T, value)                \
  template <>                                      \
  inline constexpr bool is_element_type<T> = true; \
  template <>                                      \
  inline constexpr DType dtype_of<T> = DType::value;
MICS_ELEMENT_TYPE(double, fp64)
MICS_ELEMENT_TYPE(float, fp32)
MICS_ELEMENT_TYPE(bf16, bf16)
MICS_ELEMENT_TYPE(fp16, fp16)
#undef MICS_ELEMENT_TYPE

/// Calls `f(TypeTag<T>{})` with the C++ type of `dtype` and returns what it returns.
template <class F>
decltype(auto) visit(DType dtype, F&& f) {
  switch (dtype) {
    case DType::fp64:
      return std::forward<F>(f)(TypeTag<double>{});
    case DType::fp32:
      return std::forward<F>(f)(TypeTag<float>{});
    case DType::bf16:
      return std::forward<F>(f)(TypeTag<bf16>{});
    case DType::fp16:
      break;
  }
  return std::forward<F>(f)(TypeTag<fp16>{});
}

/// Calls `f` with `float` or `double`: the types in which sums and updates are computed.
/// \throws ArgumentError for a 16-bit dtype.
template <class F>
decltype(auto) visit_arithmetic(DType dtype, F&& f) {
  if (dtype == DType::fp64) return std::forward<F>(f)(TypeTag<double>{});
  if (dtype != DType::fp32) {
    raise<ArgumentError>({.object = "arithmetic dtype",
                          .expected = "fp32 or fp64",
                          .found = std::string(name(dtype))});
  }
  return std::forward<F>(f)(TypeTag<float>{});
}

}  // namespace mics
