# SPDX-License-Identifier: Apache-2.0
# Initial cache for a Kokkos with CUDA for H100 and H200 (compute capability 9.0):
#
#   cmake -C <mics>/cmake/cache/cuda-hopper90.cmake -S <kokkos> -B build -DCMAKE_INSTALL_PREFIX=<prefix>
#   cmake --build build --target install
include("${CMAKE_CURRENT_LIST_DIR}/cuda.cmake")
set(Kokkos_ARCH_HOPPER90 ON CACHE BOOL "")
