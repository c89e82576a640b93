# SPDX-License-Identifier: Apache-2.0
# What the caches for CUDA share; one of them, for an architecture, includes it.
#
# Compiled with mics: Kokkos 4.6.99 (a snapshot) with CUDA 13.0 and g++ 13 or 14. Kokkos 4.6 to 5.x
# is meant to work. With CUDA 13 a Kokkos older than 4.7 needs two calls adapted, since their
# parameters changed: cudaGraphAddDependencies and cudaMemPrefetchAsync; CUDA 12.4 to 12.9 has the
# old ones. nvcc 13 knows no compute capability below 7.5, so that the architecture must be given.
set(CMAKE_BUILD_TYPE Release CACHE STRING "")
set(CMAKE_CXX_STANDARD 20 CACHE STRING "")
# A static Kokkos can then be linked into shared libraries.
set(CMAKE_POSITION_INDEPENDENT_CODE ON CACHE BOOL "")
set(Kokkos_ENABLE_CUDA ON CACHE BOOL "")
set(Kokkos_ENABLE_OPENMP ON CACHE BOOL "")
# The View built on mdspan reads its members at wrong offsets in reductions (nvcc 13.0 in C++20:
# illegal addresses); a Kokkos without this option ignores it.
set(Kokkos_ENABLE_IMPL_VIEW_LEGACY ON CACHE BOOL "")
