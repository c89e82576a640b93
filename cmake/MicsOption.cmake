# SPDX-License-Identifier: Apache-2.0
# Options of the project. A misspelt -DMICS_… is an error with a suggestion; CMake itself would
# ignore it, and the user would get a build without what was asked for.
include_guard(GLOBAL)

# mics_option(<MICS_NAME> "<help>" <default>): a boolean option.
function(mics_option name help default)
  option(${name} "${help}" ${default})
  set_property(GLOBAL APPEND PROPERTY mics_options ${name})
endfunction()

# Fails if the cache holds a variable MICS_… (in any case) that is no option. Call it once, after
# the last mics_option.
function(mics_check_options)
  get_property(known GLOBAL PROPERTY mics_options)
  get_cmake_property(cached CACHE_VARIABLES)
  foreach(name IN LISTS cached)
    string(TOUPPER "${name}" upper)
    if(NOT upper MATCHES "^MICS_" OR name IN_LIST known)
      continue()
    endif()
    # CMake's own entries: mics_SOURCE_DIR and the like, and the place of an installed mics.
    get_property(type CACHE ${name} PROPERTY TYPE)
    if(type MATCHES "^(STATIC|INTERNAL)$" OR name STREQUAL "mics_DIR")
      continue()
    endif()
    mics_nearest_option(nearest "${upper}")
    # The entry would outlive the mistake: the next configuration of this folder starts clean.
    unset(${name} CACHE)
    list(JOIN known " " known_text)
    message(FATAL_ERROR "mics has no option ${name}. Did you mean ${nearest}? Options: ${known_text}")
  endforeach()
endfunction()

# Sets <out> to the option that shares most words with <upper>; the first option wins a tie.
function(mics_nearest_option out upper)
  get_property(known GLOBAL PROPERTY mics_options)
  set(best -1)
  foreach(name IN LISTS known)
    if(name STREQUAL upper)
      set(score 1000)
    else()
      mics_common_pairs(score "${name}" "${upper}")
    endif()
    if(score GREATER best)
      set(best ${score})
      set(nearest ${name})
    endif()
  endforeach()
  set(${out} ${nearest} PARENT_SCOPE)
endfunction()

# Likeness of two names: 100 times the share of letter pairs of either that occur in both.
function(mics_common_pairs out left right)
  set(common 0)
  string(LENGTH "${left}" left_length)
  string(LENGTH "${right}" right_length)
  math(EXPR last "${left_length} - 2")
  foreach(at RANGE 0 ${last})
    string(SUBSTRING "${left}" ${at} 2 pair)
    string(FIND "${right}" "${pair}" found)
    if(NOT found EQUAL -1)
      math(EXPR common "${common} + 1")
    endif()
  endforeach()
  math(EXPR score "200 * ${common} / (${left_length} + ${right_length} - 2)")
  set(${out} ${score} PARENT_SCOPE)
endfunction()

function(mics_print_options)
  get_property(known GLOBAL PROPERTY mics_options)
  foreach(name IN LISTS known)
    message(STATUS "  ${name} ${${name}}")
  endforeach()
endfunction()
