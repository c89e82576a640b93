// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Core.hpp>
#include <gpt/device/views.hpp>
#include <gpt/shape.hpp>

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace mics::apps::bench {

/// Numbers between -scale and scale that look random: products of zeros would run faster. Ordered
/// on exec.
/// \param[out] data  device memory
void fill_randomly(const gpt::device::Exec& exec, gpt::device::bf16* data, std::int64_t count,
                   float scale = 1);

/// Arrays of the device that live as long as this does, filled with such numbers.
class DeviceArrays {
 public:
  /// Allocates; blocks.
  gpt::device::Rows<gpt::device::bf16> rows(std::int64_t count, std::int64_t columns,
                                            float scale = 1) {
    const auto& memory = memories_.emplace_back(
        Kokkos::view_alloc("mics::bench::DeviceArrays", Kokkos::WithoutInitializing),
        static_cast<std::size_t>(count * columns));
    fill_randomly({}, memory.data(), count * columns, scale);
    return gpt::device::Rows<gpt::device::bf16>(memory.data(), static_cast<std::size_t>(count),
                                                static_cast<std::size_t>(columns));
  }
  gpt::device::Array<gpt::device::bf16> array(std::int64_t count, float scale = 1) {
    return gpt::device::Array<gpt::device::bf16>(rows(1, count, scale).data(),
                                                 static_cast<std::size_t>(count));
  }
  /// A unit's parameters or gradients.
  template <class Unit>
  Unit unit(const gpt::UnitSpec& spec) {
    Unit result;
    auto parameter = spec.parameters.begin();
    result.visit([&](auto& view) {
      const auto& shape = parameter++->shape;
      if constexpr (std::decay_t<decltype(view)>::rank() == 1) {
        view = array(shape[0], 0.02F);
      } else {
        view = rows(shape[0], shape[1], 0.02F);
      }
    });
    return result;
  }

 private:
  std::vector<Kokkos::View<gpt::device::bf16*, gpt::device::Exec::memory_space>> memories_;
};

}  // namespace mics::apps::bench
