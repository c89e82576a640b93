/* SPDX-License-Identifier: Apache-2.0 */
/* Preloaded into the program: just before it first opens a file whose path ends with the variable
   MICS_TEST_AT, the command of the shell in MICS_TEST_MEANWHILE runs, once. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

static void meet(const char* path) {
  const char* const at = getenv("MICS_TEST_AT");
  const char* const found = getenv("MICS_TEST_MEANWHILE");
  if (at == NULL || found == NULL) return;
  const size_t length = strlen(path);
  const size_t end = strlen(at);
  if (length < end || strcmp(path + length - end, at) != 0) return;
  char* const command = strdup(found);
  unsetenv("MICS_TEST_MEANWHILE");
  unsetenv("LD_PRELOAD");
  if (system(command) != 0) abort();
  free(command);
}

int open(const char* path, int flags, ...) {
  static int (*next)(const char*, int, ...);
  if (next == NULL) *(void**)&next = dlsym(RTLD_NEXT, "open");
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  meet(path);
  return next(path, flags, mode);
}
