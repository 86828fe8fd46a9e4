/* Which pages the guest at the source has written: uffd-wp async, read and re-armed through its pagemap. */
#ifndef POSTCOPY_DIRTY_H
#define POSTCOPY_DIRTY_H

#include "memory.h"

/* Is all of the memory mapped where it was said to be, and tracked? 0 or an errno: EFAULT means that something is not mapped,
 * ENOTTY that this is not a pagemap or that Linux is older than 6.7; others as below. */
int dirty_check(const struct memory *memory, int pagemap_fd);
/* Mark in pages[] (one byte a page) what was written since it was last armed, and re-arm exactly that if asked to.
 * Returns 0 and adds the number of pages that were newly marked, or an errno: EPERM means that a range is not
 * tracked, ESRCH that the guest process has ended. */
int dirty_collect(const struct memory *memory, int pagemap_fd, bool arm, _Atomic uint8_t *pages, uint64_t *newly_marked);
/* Arm everything, whatever it was. 0 or an errno. */
int dirty_arm_all(const struct memory *memory, int pagemap_fd);
/* How many pages, of how many bytes, are written now; nothing is changed. 0 or an errno. */
int dirty_count(const struct memory *memory, int pagemap_fd, uint64_t *pages, uint64_t *bytes);

#endif
