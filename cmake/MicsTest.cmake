# SPDX-License-Identifier: Apache-2.0
# Registration of tests.
include_guard(GLOBAL)

set(MICS_TEST_LABELS quick full soak sanitize gpu)
foreach(label IN LISTS MICS_TEST_LABELS)
  add_custom_target(mics_tests_${label})
endforeach()

# What a test runs under: quiet, on any number of cores, next to other tests.
#  - OpenMP: one thread a rank, and no binding, which would put the ranks of two tests that run at
#    once on the same core. Kokkos warns where OMP_PROC_BIND is unset, and of more ranks than cores.
#  - GoogleTest would colour its output, as Open MPI gives rank 0 a terminal.
#  - Open MPI: more ranks than cores are allowed and give way to one another; no network is
#    needed on one machine (`vader` is the name of shared memory that 4.x and 5.x both know).
#  - Open MPI refuses to run as root, as in a container, unless told twice.
set(mics_test_environment OMP_NUM_THREADS=1 OMP_PROC_BIND=false KOKKOS_DISABLE_WARNINGS=1 GTEST_COLOR=no)
set(mics_test_launch "${MPIEXEC_EXECUTABLE}")
if(MPIEXEC_EXECUTABLE)
  execute_process(COMMAND "${MPIEXEC_EXECUTABLE}" --version OUTPUT_VARIABLE launcher ERROR_QUIET)
  if(launcher MATCHES "Open ?MPI|OpenRTE")
    list(APPEND mics_test_launch --oversubscribe --bind-to none)
    list(APPEND mics_test_environment OMPI_MCA_btl=self,vader OMPI_MCA_pml=ob1
         OMPI_MCA_mpi_yield_when_idle=1)
    execute_process(COMMAND id -u OUTPUT_VARIABLE user OUTPUT_STRIP_TRAILING_WHITESPACE)
    if(user STREQUAL "0")
      list(APPEND mics_test_environment OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1)
    endif()
  endif()
endif()
if(MICS_SANITIZE)
  set(suppressions "${CMAKE_CURRENT_LIST_DIR}/../tests/support/leaks_of_others.txt")
  cmake_path(NORMAL_PATH suppressions)
  list(APPEND mics_test_environment UBSAN_OPTIONS=print_stacktrace=1
       LSAN_OPTIONS=suppressions=${suppressions}:print_suppressions=0)
endif()

# mics_compile_as_test(<target>)
#
# Compiles what only tests need: with the headers that are precompiled for mics_test_main, the sources
# of a program as one, and less optimized than the library, whose own objects stay as users have
# them. Tests are half of all sources: alone and with -O3 they take twice as long.
# -DCMAKE_UNITY_BUILD=OFF compiles each source alone.
function(mics_compile_as_test target)
  if(Kokkos_ENABLE_CUDA) # nvcc_wrapper knows no precompiled headers
    return()
  endif()
  target_compile_options(
    ${target}
    PRIVATE
      "$<$<AND:$<COMPILE_LANG_AND_ID:CXX,GNU,Clang,AppleClang>,$<CONFIG:Release,RelWithDebInfo>>:-O1>"
      "$<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fpch-preprocess>")
  # Programs and libraries are compiled with different kinds of it, a precompiled header serves one.
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE OFF)
  get_target_property(sources ${target} SOURCES)
  list(LENGTH sources count)
  if(count GREATER 1 AND NOT DEFINED CMAKE_UNITY_BUILD)
    set_target_properties(${target} PROPERTIES UNITY_BUILD ON)
  endif()
  if(target STREQUAL "mics_test_main")
    target_precompile_headers(${target} PRIVATE <Kokkos_Core.hpp> <gtest/gtest.h> <mpi.h>)
  else()
    target_precompile_headers(${target} REUSE_FROM mics_test_main)
  endif()
endfunction()

# mics_add_test(<concept>.<name>
#               SOURCES <file>...
#               LIBS <target>...
#               LABELS quick|full|soak|sanitize|gpu...
#               [RANKS <n>...]
#               [TIMEOUT <seconds>]
#               [SANITIZED_SAMPLE <n>]
#               [WAITS])
#
# Builds one GoogleTest program, with tests/support/mpi_main.cpp as its main, and registers it
# once per rank count as mics.<concept>.<name>.np<n>. RANKS 0 (the default) is one process without
# mpiexec, mics.<concept>.<name>.serial. TIMEOUT (default 120) is for the whole program.
# WAITS is mics_add_test_command's.
#
# SANITIZED_SAMPLE is for programs of hundreds of cases (in_sample() of support/job.hpp), which take
# minutes where they are instrumented: one of <n> then runs with label sanitize, and all of them run
# with label soak, as mics.<concept>.<name>.np<n>.all. A prime that divides none of the numbers of
# layouts, dtypes and divisions meets all of them.
#
# A test labelled quick gets the label full as well. A program in which tests were skipped and none
# failed counts as skipped, so that a skip is seen.
function(mics_add_test name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "WAITS" "TIMEOUT;SANITIZED_SAMPLE" "SOURCES;LIBS;RANKS;LABELS")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "mics_add_test(${name}): unknown arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT name MATCHES "^[a-z0-9_]+\\.[a-z0-9_]+$")
    message(FATAL_ERROR "mics_add_test(${name}): expected <concept>.<name>")
  endif()
  if(NOT arg_SOURCES)
    message(FATAL_ERROR "mics_add_test(${name}): expected SOURCES")
  endif()
  if(NOT DEFINED arg_RANKS)
    set(arg_RANKS 0)
  endif()
  set(options)
  if(arg_TIMEOUT)
    list(APPEND options TIMEOUT ${arg_TIMEOUT})
  endif()
  if(arg_WAITS)
    list(APPEND options WAITS)
  endif()
  string(REPLACE "." "_" target "mics_test_${name}")

  add_executable(${target} ${arg_SOURCES})
  target_link_libraries(${target} PRIVATE mics_test_main mics_warnings ${arg_LIBS})
  mics_compile_as_test(${target})
  foreach(source IN LISTS arg_SOURCES)
    cmake_path(ABSOLUTE_PATH source NORMALIZE)
    set_property(GLOBAL APPEND PROPERTY mics_test_sources "${source}")
  endforeach()

  foreach(ranks IN LISTS arg_RANKS)
    # Instrumented ranks are many times slower: the counts that differ in kind are enough there.
    if(MICS_SANITIZE AND NOT ranks MATCHES "^[0124]$")
      continue()
    endif()
    if(ranks EQUAL 0)
      set(test mics.${name}.serial)
      set(launch)
    else()
      set(test mics.${name}.np${ranks})
      set(launch ${mics_test_launch} -n ${ranks})
    endif()
    mics_add_test_command(
      ${test} COMMAND ${launch} $<TARGET_FILE:${target}>
      TARGETS ${target} RANKS ${ranks} LABELS ${arg_LABELS} ${options})
    if(MICS_SANITIZE AND arg_SANITIZED_SAMPLE)
      set_property(
        TEST ${test} APPEND PROPERTY ENVIRONMENT MICS_TEST_SAMPLE=${arg_SANITIZED_SAMPLE})
      mics_add_test_command(
        ${test}.all COMMAND ${launch} $<TARGET_FILE:${target}>
        TARGETS ${target} RANKS ${ranks} LABELS soak ${options})
    endif()
    # The line that mpi_main.cpp prints if tests were skipped and none failed. GoogleTest's own
    # line would not do: CTest would call a program skipped that also failed.
    set_tests_properties(
      ${test} PROPERTIES SKIP_REGULAR_EXPRESSION "mics: passed, but skipped [0-9]+ test")
  endforeach()
endfunction()

# mics_add_test_command(<ctest name>
#                       COMMAND <word>...
#                       LABELS quick|full|soak|sanitize|gpu...
#                       [TARGETS <target>...]
#                       [RANKS <n>]
#                       [TIMEOUT <seconds>]
#                       [WAITS])
#
# Registers any command as a test, with the same labels and environment. TARGETS are what it needs
# built: the target mics_tests_<label> builds what the tests of a label need. RANKS only tells
# CTest how many processes the command starts. WAITS: most of its time the command waits, for time
# limits or for launchers to start and end, and it is right on a busy machine. CTest then starts it
# early and runs another test beside it, however many processes it starts.
function(mics_add_test_command name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "WAITS" "TIMEOUT;RANKS" "COMMAND;LABELS;TARGETS")
  if(NOT arg_COMMAND OR arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "mics_add_test_command(${name}): expected COMMAND, LABELS, TARGETS, RANKS, TIMEOUT, "
                        "WAITS")
  endif()
  foreach(label IN LISTS arg_LABELS)
    if(NOT label IN_LIST MICS_TEST_LABELS)
      list(JOIN MICS_TEST_LABELS ", " labels)
      message(FATAL_ERROR "${name}: unknown label ${label}; labels are ${labels}")
    endif()
  endforeach()
  if(NOT arg_LABELS)
    message(FATAL_ERROR "${name}: expected LABELS; a test without one would never run")
  endif()
  if("quick" IN_LIST arg_LABELS)
    list(APPEND arg_LABELS full)
    list(REMOVE_DUPLICATES arg_LABELS)
  endif()
  if(NOT arg_RANKS)
    set(arg_RANKS 1)
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 120)
  endif()
  if(MICS_SANITIZE)
    math(EXPR arg_TIMEOUT "4 * ${arg_TIMEOUT}") # instrumented code is that much slower
  endif()
  # A single test of a program may take half of the program's time; the watchdog then names it.
  math(EXPR watchdog_limit "${arg_TIMEOUT} / 2")
  foreach(label IN LISTS arg_LABELS)
    if(arg_TARGETS)
      add_dependencies(mics_tests_${label} ${arg_TARGETS})
    endif()
  endforeach()
  add_test(NAME ${name} COMMAND ${arg_COMMAND})
  set_tests_properties(
    ${name}
    PROPERTIES PROCESSORS "${arg_RANKS}"
               TIMEOUT "${arg_TIMEOUT}"
               LABELS "${arg_LABELS}"
               ENVIRONMENT "${mics_test_environment};MICS_TEST_TIMEOUT=${watchdog_limit}")
  if(arg_WAITS)
    set_tests_properties(${name} PROPERTIES PROCESSORS 1 COST "${arg_TIMEOUT}")
  endif()
endfunction()

# mics_add_gpu_runs(<concept>.<name>
#                   [RANKS <n>...]
#                   [SHARED <n>...]
#                   [ENVIRONMENT <VARIABLE=value>...]
#                   [TIMEOUT <seconds>]
#                   [ALONE])
#
# Runs of a program of mics_add_test in a build with CUDA, under the label gpu: RANKS, each with a
# device of its own, as mics.gpu.<concept>.<name>.np<n>; SHARED, all on the first device without
# NCCL, as mics.gpu.<concept>.<name>.shared.np<n>. NCCL gets few channels: it connects each of them
# for every engine. ALONE: it has as many as it wants, and nothing else may use a device meanwhile.
# Elsewhere this does nothing.
function(mics_add_gpu_runs name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "ALONE" "TIMEOUT" "RANKS;SHARED;ENVIRONMENT")
  if(arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "mics_add_gpu_runs(${name}): unknown arguments ${arg_UNPARSED_ARGUMENTS}")
  endif()
  if(NOT Kokkos_ENABLE_CUDA)
    return()
  endif()
  if(NOT arg_TIMEOUT)
    set(arg_TIMEOUT 300)
  endif()
  string(REPLACE "." "_" target "mics_test_${name}")
  set(kind)
  foreach(ranks IN LISTS arg_RANKS ITEMS shared LISTS arg_SHARED)
    if(ranks STREQUAL "shared")
      set(kind .shared)
      continue()
    endif()
    set(variables ${arg_ENVIRONMENT})
    if(kind)
      list(APPEND variables CUDA_VISIBLE_DEVICES=0)
    elseif(NOT arg_ALONE)
      list(APPEND variables NCCL_MAX_NCHANNELS=4 NCCL_MAX_P2P_NCHANNELS=4)
    endif()
    set(test mics.gpu.${name}${kind}.np${ranks})
    mics_add_test_command(
      ${test} LABELS gpu RANKS ${ranks} TIMEOUT ${arg_TIMEOUT} TARGETS ${target}
      COMMAND "${CMAKE_COMMAND}" -E env ${variables} ${mics_test_launch} -n ${ranks}
              $<TARGET_FILE:${target}>)
    set_tests_properties(
      ${test} PROPERTIES SKIP_REGULAR_EXPRESSION "mics: passed, but skipped [0-9]+ test"
                         RUN_SERIAL "${arg_ALONE}")
  endforeach()
endfunction()

# mics_leave_out_test(<file> <reason>)
#
# A source of tests that this build cannot run, and why.
function(mics_leave_out_test source reason)
  cmake_path(ABSOLUTE_PATH source NORMALIZE)
  set_property(GLOBAL APPEND PROPERTY mics_test_sources "${source}")
  message(STATUS "left out: ${source}: ${reason}")
endfunction()

# Fails if a file *_test.cpp below <folder> belongs to no mics_add_test.
function(mics_check_all_tests_registered folder)
  get_property(registered GLOBAL PROPERTY mics_test_sources)
  file(GLOB_RECURSE present CONFIGURE_DEPENDS "${folder}/*_test.cpp")
  if(registered)
    list(REMOVE_ITEM present ${registered})
  endif()
  if(present)
    list(JOIN present "\n  " files)
    message(FATAL_ERROR "these tests are in no mics_add_test:\n  ${files}")
  endif()
endfunction()
