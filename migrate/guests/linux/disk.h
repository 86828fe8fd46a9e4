/* A thread that writes blocks of a disk past the page cache, reads others back, and checks every word of them. */
#ifndef POSTCOPY_LINUX_DISK_H
#define POSTCOPY_LINUX_DISK_H

#include <stdint.h>

/* Totals so far. errors: reads and writes that failed. wrong: blocks read back that were not what had been written. */
struct disk_report {
    uint64_t writes, reads, errors, wrong;
};

/* Begins; nothing of it ends but with the guest. The disk's content is lost. 0 or a negative errno. */
int disk_start(const char *device, uint64_t seed);
void disk_read(struct disk_report *report);

#endif
