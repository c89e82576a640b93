# SPDX-License-Identifier: Apache-2.0
# Initial cache for a Kokkos with CUDA for A100 (compute capability 8.0):
#
#   cmake -C <mics>/cmake/cache/cuda-ampere80.cmake -S <kokkos> -B build -DCMAKE_INSTALL_PREFIX=<prefix>
#   cmake --build build --target install
include("${CMAKE_CURRENT_LIST_DIR}/cuda.cmake")
set(Kokkos_ARCH_AMPERE80 ON CACHE BOOL "")
