// SPDX-License-Identifier: Apache-2.0
#include <mics/base/error.hpp>
#include <mics/engine/detail/engine_state.hpp>
#include <mics/state/device_fill.hpp>
#include <mics/state/for_blocks.hpp>

#include <cstring>

// The state's memory, whether the host's or a device's.

namespace mics::detail {

void EngineState::require_reach(const Execution& exec) const {
  if (on_device() ? exec.reaches_host() == !device::separate : exec.reaches_host()) return;
  raise<ArgumentError>(
      {.object = "execution-space instance",
       .expected = "one that reaches " + std::string(name(memory_)) + " memory",
       .found = exec.reaches_host() ? "an instance of the host" : "an instance of the device",
       .remedy = "set \"memory\", or pass an instance of the other space"});
}

void EngineState::require_space(const std::string& object, bool host,
                                std::string_view space) const {
  const bool fits = on_device() ? host == !device::separate : host;
  if (fits) return;
  raise<ArgumentError>(
      {.object = object,
       .expected = "a view of " + std::string(name(plan_.request().memory)) + " memory",
       .found = std::string(space),
       .remedy = "name the memory space: view<const float**, Kokkos::LayoutRight, Space>"});
}

double* EngineState::loss(bool host, std::string_view space) {
  require_space("view of the loss", host, space);
  return on_device() ? device_step_->loss() : &loss_;
}

const double* EngineState::loss_scale(bool host, std::string_view space) const {
  require_space("view of the loss scale", host, space);
  return on_device() ? device_step_->loss_scale() : &loss_scale_;
}

void EngineState::clear(const Execution& exec, void* data, std::int64_t bytes) const {
  if (on_device()) {
    device::clear(exec, data, bytes);
  } else {
    state::clear("mics::detail::clear", data, bytes);
  }
}

void EngineState::clear_gaps(const Execution& exec, int buffer, std::byte* gradient) const {
  const std::int64_t element = bytes_of(plan_.gradient_dtype(buffer));
  const Buffer& here = buffers_[static_cast<std::size_t>(buffer)];
  if (on_device()) {
    state::clear_ranges(exec, gradient, element, here.device_gaps.rows());
    return;
  }
  for (const layout::Interval& gap : flat(buffer).flat.gaps()) {
    std::memset(gradient + gap.offset * element, 0, static_cast<std::size_t>(gap.length * element));
  }
}

void EngineState::poison(const Execution& exec, void* data, DType dtype, std::int64_t count) const {
  if (on_device()) {
    state::poison(exec, data, dtype, count);
  } else {
    state::poison(data, dtype, count);
  }
}

void EngineState::copy_out(void* host, const std::byte* data, std::int64_t bytes) const {
  if (!on_device()) {
    std::memcpy(host, data, static_cast<std::size_t>(bytes));
    return;
  }
  device::copy(exec_, host, data, bytes);
  exec_.fence("mics::detail::copy_out");
}

void EngineState::copy_in(std::byte* data, const void* host, std::int64_t bytes) const {
  if (!on_device()) {
    std::memcpy(data, host, static_cast<std::size_t>(bytes));
    return;
  }
  device::copy(exec_, data, host, bytes);
  exec_.fence("mics::detail::copy_in");
}

void EngineState::copy_within(void* to, const void* from, std::int64_t bytes) const {
  if (on_device()) {
    device::copy(exec_, to, from, bytes);
  } else {
    std::memcpy(to, from, static_cast<std::size_t>(bytes));
  }
}

}  // namespace mics::detail
