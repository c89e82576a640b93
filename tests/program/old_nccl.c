// SPDX-License-Identifier: Apache-2.0
// Loaded before NCCL it makes the program believe that an older one is installed.
int ncclGetVersion(int* version) {
  *version = 21703;
  return 0;
}
