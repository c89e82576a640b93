// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <type_traits>

namespace mics::optim {

/// What an update of one buffer depends on, decided by the device: plain data in its memory, so
/// that a kernel which is enqueued before the decision can follow it.
struct DeviceStepInfo {
  double learning_rate = 0;
  double beta1 = 0;
  double beta2 = 0;
  double correction1 = 1;  ///< 1 - beta1^step; 1 where bias corrections are off
  double correction2 = 1;
  double gradient_scale = 1;  ///< as StepInfo::gradient_scale
  std::int64_t step = 1;      ///< updates of this buffer, this one included
  std::int32_t update = 0;    ///< 0: the kernel leaves everything as it is
  std::int32_t unused = 0;
};
static_assert(std::is_trivially_copyable_v<DeviceStepInfo> && sizeof(DeviceStepInfo) == 64);

}  // namespace mics::optim
