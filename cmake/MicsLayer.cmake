# SPDX-License-Identifier: Apache-2.0
# One library target per layer of mics.
include_guard(GLOBAL)

# mics_add_layer(<name>
#                [SOURCES <file>...]
#                [HEADERS <file>...]
#                [DEPENDS <layer or target>...]
#                [BUILD_DEPENDS <target>...]
#                [COMPILE_OPTIONS <option>...])
#
# Makes the target mics_<name> with the alias mics::<name>, installs and exports it. To be called
# in lib/mics/<name>/CMakeLists.txt; files are relative to that folder. Example:
#
#   mics_add_layer(state
#     SOURCES arena.cpp detail/fill.cpp
#     HEADERS arena.hpp detail/fill.hpp
#     DEPENDS layout comm)
#
# HEADERS        all headers of the folder, those in detail/ too: public ones include them. Every
#                <file>.hpp.in of the folder is configured into the build tree and added.
# DEPENDS        layers and targets that the headers need; a user of this layer gets them too.
# BUILD_DEPENDS  header-only targets that only the sources need; an installed mics does without.
#
# COMPILE_OPTIONS are for all sources, which then do not share the other layers' precompiled header.
#
# A layer without SOURCES is an interface library.
function(mics_add_layer name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "" "" "SOURCES;HEADERS;DEPENDS;BUILD_DEPENDS;COMPILE_OPTIONS")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "mics_add_layer(${name}): unknown arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  set(target mics_${name})
  list(TRANSFORM arg_DEPENDS REPLACE "^([a-z0-9_]+)$" "mics::\\1")
  if(arg_SOURCES)
    set(scope PUBLIC)
    add_library(${target} ${arg_SOURCES})
    target_link_libraries(
      ${target} PRIVATE "$<BUILD_INTERFACE:mics_warnings>" "$<BUILD_INTERFACE:${arg_BUILD_DEPENDS}>")
    set_target_properties(${target} PROPERTIES VERSION ${PROJECT_VERSION}
                                               SOVERSION ${PROJECT_VERSION_MAJOR})
  else()
    set(scope INTERFACE)
    add_library(${target} INTERFACE)
  endif()
  add_library(mics::${name} ALIAS ${target})
  set_target_properties(${target} PROPERTIES EXPORT_NAME ${name})

  set(generated_root "${PROJECT_BINARY_DIR}/generated")
  list(TRANSFORM arg_HEADERS PREPEND "${CMAKE_CURRENT_SOURCE_DIR}/" OUTPUT_VARIABLE headers)
  file(GLOB templates RELATIVE "${CMAKE_CURRENT_SOURCE_DIR}" CONFIGURE_DEPENDS *.hpp.in)
  foreach(template IN LISTS templates)
    cmake_path(REMOVE_EXTENSION template LAST_ONLY OUTPUT_VARIABLE header)
    configure_file("${template}" "${generated_root}/mics/${name}/${header}" @ONLY)
    list(APPEND headers "${generated_root}/mics/${name}/${header}")
  endforeach()
  # lib/ is the include root: the path that one opens is the path that one includes.
  target_sources(
    ${target}
    ${scope}
    FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/lib" "${generated_root}" FILES ${headers})

  target_compile_features(${target} ${scope} cxx_std_20)
  target_link_libraries(${target} ${scope} ${arg_DEPENDS})
  target_compile_definitions(${target} ${scope} ${mics_mpi_definitions})
  mics_instrument(${target} ${scope})
  if(arg_COMPILE_OPTIONS)
    target_compile_options(${target} PRIVATE ${arg_COMPILE_OPTIONS})
    set_target_properties(${target} PROPERTIES MICS_OWN_PRECOMPILED TRUE)
  endif()
  mics_precompile(${target} ${arg_DEPENDS})

  install(
    TARGETS ${target}
    EXPORT mics-targets
    FILE_SET HEADERS DESTINATION "${CMAKE_INSTALL_INCLUDEDIR}"
    ARCHIVE DESTINATION "${CMAKE_INSTALL_LIBDIR}"
    LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}"
    RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endfunction()

# mpi.h of Open MPI 4 and of older MPICH declares C++ classes whose functions lie in a library that
# nobody who asks for MPI's C interface links.
set(mics_mpi_definitions OMPI_SKIP_MPICXX MPICH_SKIP_MPICXX)

# Gives <target> the precompiled Kokkos_Core.hpp and mpi.h if Kokkos is among what it depends on,
# directly or through a layer. Reading those two is most of the time that a small source takes
# (2.7 s; 1.0 s precompiled). Layers share one header, which takes 7 s and 160 MB to make, but for
# those with compiler options of their own: a header serves one set of options.
function(mics_precompile target)
  set(wanted FALSE)
  foreach(dependency IN LISTS ARGN)
    if(dependency STREQUAL "Kokkos::kokkos")
      set(wanted TRUE)
    elseif(TARGET ${dependency})
      get_target_property(of_dependency ${dependency} MICS_PRECOMPILED)
      if(of_dependency)
        set(wanted TRUE)
      endif()
    endif()
  endforeach()
  # nvcc_wrapper knows no precompiled headers.
  if(NOT wanted OR Kokkos_ENABLE_CUDA)
    return()
  endif()
  set_target_properties(${target} PROPERTIES MICS_PRECOMPILED TRUE)
  get_target_property(type ${target} TYPE)
  if(type STREQUAL "INTERFACE_LIBRARY")
    return()
  endif()
  get_target_property(own ${target} MICS_OWN_PRECOMPILED)
  if(own)
    target_precompile_headers(${target} PRIVATE <Kokkos_Core.hpp>) # it may know no MPI
  else()
    mics_share_precompiled(${target})
  endif()
  # Another definition would make the header useless.
  target_compile_definitions(${target} PRIVATE ${mics_mpi_definitions})
  # Without it ccache cannot see what a precompiled header holds.
  target_compile_options(${target} PRIVATE "$<$<CXX_COMPILER_ID:GNU>:-fpch-preprocess>")
endfunction()

# Gives <target> the precompiled header that layers share.
function(mics_share_precompiled target)
  if(NOT TARGET mics_precompiled)
    set(source "${PROJECT_BINARY_DIR}/generated/precompiled.cpp")
    file(CONFIGURE OUTPUT "${source}" CONTENT "")
    add_library(mics_precompiled OBJECT "${source}")
    target_compile_features(mics_precompiled PRIVATE cxx_std_20)
    target_link_libraries(mics_precompiled PRIVATE Kokkos::kokkos MPI::MPI_C)
    target_compile_definitions(mics_precompiled PRIVATE ${mics_mpi_definitions})
    mics_instrument(mics_precompiled PRIVATE)
    target_precompile_headers(mics_precompiled PRIVATE <Kokkos_Core.hpp> <mpi.h>)
  endif()
  target_precompile_headers(${target} REUSE_FROM mics_precompiled)
endfunction()

# Sanitizer flags, where they are asked for, and what libFuzzer is guided by. A layer's users get
# them too: a program that is not instrumented cannot load an instrumented library.
function(mics_instrument target scope)
  if(MICS_SANITIZE OR MICS_FUZZ)
    target_compile_options(
      ${target} ${scope} -fsanitize=address,undefined -fno-sanitize-recover=undefined
      -fno-omit-frame-pointer)
    target_link_options(${target} ${scope} -fsanitize=address,undefined)
  endif()
  if(MICS_FUZZ)
    target_compile_options(${target} ${scope} -fsanitize=fuzzer-no-link)
  endif()
endfunction()
