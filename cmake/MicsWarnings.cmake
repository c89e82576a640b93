# SPDX-License-Identifier: Apache-2.0
# mics_warnings: the project's compiler warnings. Linked privately and never exported, so that an
# application's build sees none of them.
include_guard(GLOBAL)

add_library(mics_warnings INTERFACE)
# -Wconversion is absent: index arithmetic mixes MPI's int counts with 64-bit offsets, and the
# narrowing is checked at run time where it can happen.
target_compile_options(
  mics_warnings
  INTERFACE
    "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU,Clang,AppleClang,IntelLLVM>>:-Wall;-Wextra;-Wshadow;-Wnon-virtual-dtor;-Woverloaded-virtual>"
)
if(NOT Kokkos_ENABLE_CUDA) # what nvcc makes of a lambda has semicolons of its own
  target_compile_options(
    mics_warnings
    INTERFACE
      "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU,Clang,AppleClang,IntelLLVM>>:-Wextra-semi>"
  )
endif()
if(MICS_WARNINGS_AS_ERRORS)
  target_compile_options(mics_warnings INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:-Werror>")
endif()
