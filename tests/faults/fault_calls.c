/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "fault_calls.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

enum { most_calls = 4096, most_descriptors = 4096 };

static char watched[4096];
static _Atomic int armed;
static enum mics_fault fault;
static long fault_at;
static void (*about_to_end)(void);
static _Atomic long next_call;
static const char* names[most_calls];
static _Atomic int is_watched[most_descriptors];

void mics_fault_arm(const char* folder, enum mics_fault what, long at, void (*about)(void)) {
  snprintf(watched, sizeof watched, "%s", folder);
  fault = what;
  fault_at = at;
  about_to_end = about;
  next_call = 0;
  armed = 1;
}

long mics_fault_disarm(void) {
  armed = 0;
  return next_call;
}

const char* mics_fault_call(long index) {
  return index >= 0 && index < most_calls && index < next_call ? names[index] : "none";
}

/* What a call can meet. */
enum { writes = 1, moves = 2, interrupts = 4 };

enum answer { go_on, fail, halve, die_after };

static void end_process(void) {
  if (about_to_end != NULL) about_to_end();
  kill(getpid(), fault == mics_fault_stop ? SIGSTOP : SIGKILL);
}

/* Counts a call; on `fail` errno is set. */
static enum answer meet(const char* name, int properties) {
  const long here = next_call++;
  if (here < most_calls) names[here] = name;
  if (fault == mics_fault_full && here >= fault_at && (properties & writes) != 0) {
    errno = ENOSPC;
    return fail;
  }
  if (here != fault_at) return go_on;
  switch (fault) {
    case mics_fault_kill_before:
    case mics_fault_stop:
      end_process();
      return go_on;
    case mics_fault_kill_after:
      return die_after;
    case mics_fault_eio:
      errno = EIO;
      return fail;
    case mics_fault_enospc:
      errno = ENOSPC;
      return fail;
    case mics_fault_edquot:
      errno = EDQUOT;
      return fail;
    case mics_fault_short:
      return (properties & moves) != 0 ? halve : go_on;
    case mics_fault_eintr:
      errno = EINTR;
      return (properties & interrupts) != 0 ? fail : go_on;
    default:
      return go_on;
  }
}

static int watches_path(const char* path) {
  return armed && path != NULL && strncmp(path, watched, strlen(watched)) == 0;
}
static int watches(int descriptor) {
  return armed && descriptor >= 0 && descriptor < most_descriptors && is_watched[descriptor];
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* `call` with a fault, where `here` says that it counts. */
#define AT_CALL(here, name, properties, call)          \
  do {                                                 \
    if (!(here)) return call;                          \
    const enum answer answer = meet(name, properties); \
    if (answer == fail) return -1;                     \
    const __typeof__(call) result = call;              \
    if (answer == die_after) end_process();            \
    return result;                                     \
  } while (0)

static int note(int descriptor, int here) {
  if (descriptor >= 0 && descriptor < most_descriptors) is_watched[descriptor] = here;
  return descriptor;
}

static int open_with_fault(int here, int folder, const char* path, int flags, mode_t mode) {
  __typeof__(&openat) const real = REAL(openat);
  if (!here) return note(real(folder, path, flags, mode), 0);
  const enum answer answer = meet("open", interrupts | ((flags & O_CREAT) != 0 ? writes : 0));
  if (answer == fail) return -1;
  const int descriptor = note(real(folder, path, flags, mode), 1);
  if (answer == die_after) end_process();
  return descriptor;
}

#define MODE_OF(flags)                          \
  mode_t mode = 0;                              \
  if (((flags) & (O_CREAT | O_TMPFILE)) != 0) { \
    va_list rest;                               \
    va_start(rest, flags);                      \
    mode = va_arg(rest, mode_t);                \
    va_end(rest);                               \
  }

int open(const char* path, int flags, ...) {
  MODE_OF(flags)
  return open_with_fault(watches_path(path), AT_FDCWD, path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  MODE_OF(flags)
  return open_with_fault(watches_path(path), AT_FDCWD, path, flags, mode);
}
int openat(int folder, const char* path, int flags, ...) {
  MODE_OF(flags)
  return open_with_fault(watches_path(path) || watches(folder), folder, path, flags, mode);
}

int close(int descriptor) {
  __typeof__(&close) const real = REAL(close);
  if (!watches(descriptor)) {
    note(descriptor, 0);
    return real(descriptor);
  }
  note(descriptor, 0);
  /* It is closed whatever the call says. */
  const enum answer answer = meet("close", interrupts);
  const int reason = errno;
  const int result = real(descriptor);
  if (answer == die_after) end_process();
  if (answer != fail) return result;
  errno = reason;
  return -1;
}

/* Past the page cache the kernel stops at sectors. */
static size_t half_of(size_t bytes) {
  return bytes >= 4096 ? bytes / 2 / 512 * 512 : bytes > 1 ? bytes / 2 : bytes;
}

ssize_t pwrite(int descriptor, const void* data, size_t bytes, off_t offset) {
  __typeof__(&pwrite) const real = REAL(pwrite);
  if (!watches(descriptor)) return real(descriptor, data, bytes, offset);
  const enum answer answer = meet("pwrite", writes | moves | interrupts);
  if (answer == fail) return -1;
  const ssize_t done = real(descriptor, data, answer == halve ? half_of(bytes) : bytes, offset);
  if (answer == die_after) end_process();
  return done;
}
ssize_t pread(int descriptor, void* data, size_t bytes, off_t offset) {
  __typeof__(&pread) const real = REAL(pread);
  if (!watches(descriptor)) return real(descriptor, data, bytes, offset);
  const enum answer answer = meet("pread", moves | interrupts);
  if (answer == fail) return -1;
  /* A direct read is short in whole blocks. */
  const size_t part = bytes > 8192 ? 4096 : bytes;
  const ssize_t done = real(descriptor, data, answer == halve ? part : bytes, offset);
  if (answer == die_after) end_process();
  return done;
}

int fsync(int descriptor) {
  AT_CALL(watches(descriptor), "fsync", writes | interrupts, REAL(fsync)(descriptor));
}
int ftruncate(int descriptor, off_t bytes) {
  AT_CALL(watches(descriptor), "ftruncate", writes | interrupts,
          REAL(ftruncate)(descriptor, bytes));
}
int fallocate(int descriptor, int mode, off_t offset, off_t bytes) {
  AT_CALL(watches(descriptor), "fallocate", writes | interrupts,
          REAL(fallocate)(descriptor, mode, offset, bytes));
}
int flock(int descriptor, int operation) {
  AT_CALL(watches(descriptor), "flock", interrupts, REAL(flock)(descriptor, operation));
}
int fstat(int descriptor, struct stat* status) {
  AT_CALL(watches(descriptor), "fstat", 0, REAL(fstat)(descriptor, status));
}
int mkdir(const char* path, mode_t mode) {
  AT_CALL(watches_path(path), "mkdir", writes | interrupts, REAL(mkdir)(path, mode));
}
int rename(const char* from, const char* to) {
  AT_CALL(watches_path(from), "rename", writes | interrupts, REAL(rename)(from, to));
}
int renameat2(int from_folder, const char* from, int to_folder, const char* to,
              unsigned int flags) {
  AT_CALL(watches_path(from), "renameat2", writes | interrupts,
          REAL(renameat2)(from_folder, from, to_folder, to, flags));
}
int unlink(const char* path) {
  AT_CALL(watches_path(path), "unlink", interrupts, REAL(unlink)(path));
}
int rmdir(const char* path) { AT_CALL(watches_path(path), "rmdir", interrupts, REAL(rmdir)(path)); }
int stat(const char* path, struct stat* status) {
  AT_CALL(watches_path(path), "stat", 0, REAL(stat)(path, status));
}

DIR* opendir(const char* path) {
  __typeof__(&opendir) const real = REAL(opendir);
  if (!watches_path(path)) return real(path);
  const enum answer answer = meet("opendir", 0);
  if (answer == fail) return NULL;
  DIR* const folder = real(path);
  if (answer == die_after) end_process();
  return folder;
}
