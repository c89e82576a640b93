// SPDX-License-Identifier: Apache-2.0
// Stands for a plugin of libhdf5: code that runs when it is loaded.
#include <cstdlib>

__attribute__((constructor)) static void loaded() { setenv("MICS_TEST_PLUGIN", "loaded", 1); }
