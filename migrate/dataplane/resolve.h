/* Letting faulting threads run on: the fill ioctls of userfaultfd, with outcomes that are not errors given names. */
#ifndef POSTCOPY_RESOLVE_H
#define POSTCOPY_RESOLVE_H

#include <stdbool.h>

#include "memory.h"

enum resolve_outcome {
    RESOLVE_MAPPED,    /* mapped now, waiters woken */
    RESOLVE_ALREADY,   /* EEXIST: was mapped; woken by hand, since the kernel does not */
    RESOLVE_HOLE,      /* EFAULT: no page in the file */
    RESOLVE_CHANGING,  /* EAGAIN, and it stays: an event is unread, or the guest has not gone on since it was read */
    RESOLVE_GONE,      /* ESRCH: the guest process has ended; ENOENT: it unmapped the range */
    RESOLVE_FAILED,    /* error_number */
};

struct resolution {
    enum resolve_outcome outcome; /* of the page at which it ended; RESOLVE_MAPPED when all pages are mapped */
    int error_number;
    uint64_t pages_done; /* pages from the start that are mapped */
    uint64_t wakes;      /* of these, mapped before and woken */
};

/* UFFDIO_CONTINUE over page_count pages, stepping over what is mapped already. */
struct resolution resolve_continue(int userfaultfd, const struct region *region, uint64_t page_index, uint64_t page_count);
/* Map one zero page: the file has a hole there, and zero is its final content. */
struct resolution resolve_zero(int userfaultfd, const struct region *region, uint64_t page_index);
/* UFFDIO_POISON over page_count pages: who waits there, or touches one, gets SIGBUS. Where a page is mapped, or its file has ended, nothing
 * is to be done but to wake who waits. */
struct resolution resolve_poison(int userfaultfd, const struct region *region, uint64_t page_index, uint64_t page_count);
/* Whether this kernel has that (Linux 6.6). */
bool resolve_can_poison(int userfaultfd);
/* Let whoever waits there try again: he finds the page, or faults anew. */
void resolve_wake(int userfaultfd, const struct region *region, uint64_t page_index, uint64_t page_count);
/* UFFDIO_UNREGISTER of the whole region. 0 or an errno. */
int resolve_unregister(int userfaultfd, const struct region *region);

#endif
