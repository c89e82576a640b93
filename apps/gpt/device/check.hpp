// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace gpt::device {

/// \throws std::runtime_error naming the operation and the vendor's own text, unless it succeeded
inline void check(cudaError_t status, const char* operation) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("gpt::device: ") + operation + ": expected success, found " +
                           cudaGetErrorName(status) + ": " + cudaGetErrorString(status));
}

inline void check(cublasStatus_t status, const char* operation) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string("gpt::device: ") + operation + ": expected success, found " +
                           cublasLtGetStatusString(status));
}

}  // namespace gpt::device
