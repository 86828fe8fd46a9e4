/* What the preloaded object and the agent say to each other, over a SOCK_SEQPACKET pair that QEMU inherits; preload.py is
 * the other end. One datagram is one message, in this host's byte order. */
#ifndef POSTCOPY_PRELOAD_H
#define POSTCOPY_PRELOAD_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* In the environment: "socket descriptor:st_dev:st_ino of the memory file:r (runs) or w (waits for a guest)". */
#define PRELOAD_ENVIRONMENT "POSTCOPY_QEMU_MEMORY"

enum preload_report_kind {
    PRELOAD_MAPPED = 1,  /* QEMU has mapped the memory file; with its userfaultfd attached where the guest waits */
    PRELOAD_TRACKING = 2, /* answer to PRELOAD_TRACK; with the pagemap attached */
};

struct preload_report {
    uint32_t kind;
    int32_t error_number; /* 0, or why it could not be; nothing is attached then */
    uint64_t address, size_bytes, offset_bytes; /* PRELOAD_MAPPED */
    char step[40]; /* what failed */
};

enum preload_command {
    PRELOAD_TRACK = 1,   /* register for asynchronous write protection */
    PRELOAD_UNTRACK = 2, /* not answered */
    PRELOAD_WHOLE = 3,   /* all memory is here: let the userfaultfd go; not answered */
};

/* Inside the object: called before the caller of mmap() has the address. */
void preload_mapped(void *address, size_t size_bytes, int fd, off_t offset_bytes);

_Static_assert(sizeof(struct preload_report) == 72, "as preload.py unpacks it");

#endif
