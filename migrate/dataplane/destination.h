/* One migration's destination half, as its loops share it. */
#ifndef POSTCOPY_DESTINATION_H
#define POSTCOPY_DESTINATION_H

#include "memory.h"
#include "pages.h"
#include "place.h"
#include "waiting.h"

/* Where a page's copies have come from, one atomic byte a page: a second copy by the same path is the peer's error. */
#define COPY_ASKED 0x01u /* requested on the urgent connection, not answered yet (only the fault loop's thread) */
#define COPY_BULK 0x02u  /* came by bulk */
#define COPY_IN_FILE 0x04u /* precopied: the file holds bytes of it, stale ones perhaps */

struct destination {
    struct memory memory;
    int userfaultfd;
    int stop_fd;
    int final_fd;
    int marked_fd; /* readable: the mark has come */
    int open_fd;   /* readable: the guest has been resumed here */
    uint64_t poll_ns; /* how long the fault loop looks before it sleeps, at most */
    page_byte *state;
    _Atomic uint8_t *copies;
    _Atomic uint64_t map_steer; /* flat page of the last local fault: where to map ahead next; STEER_NONE */
    uint64_t judged_final; /* by the stale set; only the bulk loop that takes it */
    struct waiting waiting;
    struct histogram latency[FAULT_KINDS];
#define X(name) _Atomic uint64_t name;
    DESTINATION_COUNTERS(X)
#undef X
};

/* Bring one frame's pages, or its zeroes, to where faults end. False: result says why. */
bool destination_take_pages(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                            const char *bytes, enum page_path path, struct loop_result *result);
bool destination_take_zeroes(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                             enum page_path path, struct loop_result *result);

/* Map pages that are PRESENT (or the ZERO page at page_index) and let their faults run on. */
bool destination_map_present(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                             struct loop_result *result);
bool destination_map_zero(struct destination *destination, const struct region *region, uint64_t page_index, struct loop_result *result);

/* What the file holds of an earlier copy of these pages goes: they read as zeroes then. They are claimed, or nobody's. 0 or an errno. */
int destination_clear_old(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count);
/* So many pages more need nothing of the source. */
void destination_became_final(struct destination *destination, uint64_t page_count);

/* The page's fault has been resolved: record how long it took, if it was timed. */
void destination_end_wait(struct destination *destination, uint64_t page, enum fault_kind kind);

#endif
