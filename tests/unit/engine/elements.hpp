// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "host_access.hpp"
#include <mics/mics.hpp>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace mics::test {

/// A parameter of a lease, or its gradient of a scope, on the host until the end of the block.
template <class DataType, class Layout = Kokkos::LayoutRight>
[[nodiscard]] auto on_host(const Lease& lease, ParameterId id) {
  return host_view<DataType, Layout>(lease, id);
}
template <class DataType, class Layout = Kokkos::LayoutRight>
[[nodiscard]] auto on_host(const GradientScope& scope, ParameterId id) {
  return host_gradient<DataType, Layout>(scope, id);
}

/// Calls `f(row-major index, element)` for every element of a parameter of 0 to 2 extents, through
/// the view that a lease (const elements) or a gradient scope gives for that dtype and its layout.
template <class Handle, class F>
void for_each_element(const Model& model, const Handle& handle, ParameterId id, DType dtype,
                      const F& f) {
  const ParameterSpec& spec = model.spec(id);
  const bool left = spec.options.layout == MemoryLayout::left;
  visit(dtype, [&](auto tag) {
    using Value = typename decltype(tag)::type;
    using T = std::conditional_t<std::is_same_v<Handle, Lease>, const Value, Value>;
    const auto matrix = [&](const auto& view) {
      for (std::int64_t i = 0; i < spec.shape[0]; ++i) {
        for (std::int64_t j = 0; j < spec.shape[1]; ++j) f(i * spec.shape[1] + j, view(i, j));
      }
    };
    if (spec.shape.empty()) {
      f(0, on_host<T>(handle, id)());
    } else if (spec.shape.size() == 1) {
      const auto view = on_host<T*>(handle, id);
      for (std::int64_t i = 0; i < spec.shape[0]; ++i) f(i, view(i));
    } else if (left) {
      matrix(on_host<T**, Kokkos::LayoutLeft>(handle, id));
    } else {
      matrix(on_host<T**>(handle, id));
    }
  });
}

/// Element type of a parameter's views, and of its gradient's.
[[nodiscard]] inline DType dtype_of_parameter(const Model& model, ParameterId id,
                                              const Config& config) {
  return model.spec(id).options.dtype.value_or(config.compute);
}
[[nodiscard]] inline DType dtype_of_gradient(const Model& model, ParameterId id,
                                             const Config& config) {
  const DType own = dtype_of_parameter(model, id, config);
  return own == DType::fp64 ? own : config.gradient.value_or(own);
}

/// Adds `value(row-major index)` to a parameter's gradient, rounded to its dtype.
template <class F>
void add_gradient(const Model& model, const GradientScope& scope, ParameterId id,
                  const Config& config, const F& value) {
  for_each_element(
      model, scope, id, dtype_of_gradient(model, id, config), [&](std::int64_t i, auto& element) {
        using T = std::remove_cvref_t<decltype(element)>;
        element = static_cast<T>(static_cast<double>(element) + static_cast<double>(value(i)));
      });
}

/// Writes `value(row-major index)` to a parameter's gradient.
template <class F>
void set_gradient(const Model& model, const GradientScope& scope, ParameterId id,
                  const Config& config, const F& value) {
  for_each_element(
      model, scope, id, dtype_of_gradient(model, id, config), [&](std::int64_t i, auto& element) {
        element =
            static_cast<std::remove_cvref_t<decltype(element)>>(static_cast<double>(value(i)));
      });
}

/// How many elements of a gathered parameter differ in any bit from `value(row-major index)`
/// rounded to the parameter's dtype.
template <class F>
[[nodiscard]] std::int64_t count_differences(const Model& model, const Lease& lease, ParameterId id,
                                             const Config& config, const F& value) {
  std::int64_t differences = 0;
  const DType dtype = dtype_of_parameter(model, id, config);
  for_each_element(model, lease, id, dtype, [&](std::int64_t i, const auto& element) {
    using T = std::remove_cvref_t<decltype(element)>;
    const auto expected = static_cast<T>(value(i));
    differences += std::memcmp(&expected, &element, sizeof(T)) != 0 ? 1 : 0;
  });
  return differences;
}

}  // namespace mics::test
