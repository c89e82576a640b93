/* SPDX-License-Identifier: Apache-2.0 */
/* Takes the place of the C library's file functions in the program that it is linked into, and of
   those that libstdc++ calls: one call on a file below a folder fails, or ends or stops the
   process. Calls on other files are left alone. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif

enum mics_fault {
  mics_fault_none,
  mics_fault_kill_before,
  mics_fault_kill_after,
  mics_fault_stop, /* SIGSTOP before the call */
  mics_fault_eio,
  mics_fault_enospc,
  mics_fault_edquot,
  mics_fault_short, /* half of what was asked for is moved */
  mics_fault_eintr, /* where a call can be interrupted */
  mics_fault_full,  /* ENOSPC here and at all later calls that write */
};

/* From now on calls below `folder` count, and call number `at`, from 0, meets `fault`. `about` runs
   just before a fault that ends or stops the process. */
void mics_fault_arm(const char* folder, enum mics_fault fault, long at, void (*about)(void));

/* Calls made since then; no more faults come. */
long mics_fault_disarm(void);

/* The name of call `index` since it was armed: `fsync`. */
const char* mics_fault_call(long index);

#ifdef __cplusplus
}
#endif
