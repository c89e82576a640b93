# SPDX-License-Identifier: Apache-2.0
# Finds ISA-L, which ships no CMake package: target ISAL::isal, variable ISAL_VERSION.
# ISAL_ROOT (variable or environment) names its prefix.
find_path(ISAL_INCLUDE_DIR isa-l/crc.h)
find_library(ISAL_LIBRARY isal)
mark_as_advanced(ISAL_INCLUDE_DIR ISAL_LIBRARY)

set(ISAL_VERSION)
if(ISAL_INCLUDE_DIR)
  file(STRINGS "${ISAL_INCLUDE_DIR}/isa-l.h" lines
       REGEX "^#define ISAL_(MAJOR|MINOR|PATCH)_VERSION +[0-9]+")
  foreach(part IN ITEMS MAJOR MINOR PATCH)
    if(lines MATCHES "ISAL_${part}_VERSION +([0-9]+)")
      list(APPEND ISAL_VERSION ${CMAKE_MATCH_1})
    endif()
  endforeach()
  list(JOIN ISAL_VERSION "." ISAL_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  ISAL
  REQUIRED_VARS ISAL_LIBRARY ISAL_INCLUDE_DIR
  VERSION_VAR ISAL_VERSION)

if(ISAL_FOUND AND NOT TARGET ISAL::isal)
  add_library(ISAL::isal UNKNOWN IMPORTED)
  set_target_properties(
    ISAL::isal PROPERTIES IMPORTED_LOCATION "${ISAL_LIBRARY}"
                          INTERFACE_INCLUDE_DIRECTORIES "${ISAL_INCLUDE_DIR}")
endif()
