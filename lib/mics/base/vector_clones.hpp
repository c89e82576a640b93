// SPDX-License-Identifier: Apache-2.0
#pragma once

/// Before a function whose loops become vector instructions: compiled for each generation of x86-64
/// and chosen when the program starts. For code that has the same bits on every CPU. Sanitizers run
/// before the CPU is known.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define MICS_VECTOR_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MICS_VECTOR_CLONES
#endif
