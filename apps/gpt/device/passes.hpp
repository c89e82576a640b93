// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <mics/base/dtype.hpp>

#include <Kokkos_Macros.hpp>
#include <gpt/passes.hpp>

#include <memory>
#include <stdexcept>

namespace gpt::device {

/// Passes whose activations, parameters and gradients lie in the memory of a CUDA device, in bf16.
/// The device's memory is taken here, once: see Activations. Local; blocks.
/// \throws std::invalid_argument if `compute` is not bf16 or the kernels do not take the shape
#if defined(KOKKOS_ENABLE_CUDA)
[[nodiscard]] std::unique_ptr<Passes> make_passes(const GptShape& shape, GptIds ids,
                                                  mics::DType compute, int batch,
                                                  Recompute recompute);
#else
[[nodiscard]] inline std::unique_ptr<Passes> make_passes(const GptShape& /*shape*/, GptIds /*ids*/,
                                                         mics::DType /*compute*/, int /*batch*/,
                                                         Recompute /*recompute*/) {
  throw std::invalid_argument(
      "gpt::Gpt: device: expected a CUDA device, found another; use the engine's memory \"host\"");
}
#endif

}  // namespace gpt::device
