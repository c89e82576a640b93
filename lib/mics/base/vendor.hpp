// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Kokkos_Macros.hpp>

// The one place that tells the vendors' run-time libraries apart. CUDA and HIP have the same calls
// under their own prefix: MICS_VENDOR(EventRecord) is cudaEventRecord or hipEventRecord. Sources
// include it; public headers do not.

#if defined(KOKKOS_ENABLE_CUDA)
#include <cuda_runtime_api.h>
#define MICS_HAS_DEVICE
#define MICS_VENDOR(name) cuda##name
#elif defined(KOKKOS_ENABLE_HIP)
#include <hip/hip_runtime_api.h>
#define MICS_HAS_DEVICE
#define MICS_VENDOR(name) hip##name
#endif
