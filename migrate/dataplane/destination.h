/* One migration's destination half, as its loops share it. */
#ifndef POSTCOPY_DESTINATION_H
#define POSTCOPY_DESTINATION_H

#include <sys/types.h>

#include "claims.h"
#include "memory.h"
#include "pages.h"
#include "place.h"
#include "waiting.h"

/* Where a page's copies have come from, one atomic byte a page: a second copy by the same path is the peer's error. */
#define COPY_ASKED 0x01u /* requested on the urgent connection, not answered yet (only the fault loop's thread) */
#define COPY_BULK 0x02u  /* came by bulk */
#define COPY_AHEAD 0x08u /* came by readahead */
#define COPY_STALE 0x10u /* the stale set names it */
#define COPY_IN_FILE 0x04u /* precopied: the file holds bytes of it, stale ones perhaps */
#define COPY_TOUCHED 0x40u /* STALE, and a fault has waited for it (only the fault loop's thread) */
#define COPY_WHOLE 0x20u /* came in chunks, and is final: need not be asked for. Then ASKED stays, as late chunks may come */

struct destination {
    struct memory memory;
    int userfaultfd;
    int stop_fd;
    int final_fd;
    int marked_fd; /* readable: the marks of all bulk connections have come, their loops are parked */
    int open_fd;   /* readable: the guest has been resumed here */
    int judged_fd; /* readable: the stale set has been applied */
    int foreseen_fd; /* readable: foreseen[] is to be asked for */
    uint32_t foreseen_count;
    uint64_t foreseen[FORESEEN_MAX]; /* flat pages; written once, before foreseen_fd */
    uint32_t streams; /* bulk connections */
    _Atomic uint32_t marks; /* that have come */
    uint64_t poll_ns; /* how long the fault loop looks before it sleeps, at most */
    int states_fd; /* of the memfd in which state lies: the guest keeps it (restore.c) */
    page_byte *state;
    struct claims claims; /* of pages that come in chunks */
    _Atomic uint8_t *copies;
    _Atomic uint64_t map_steer; /* flat page of the last local fault: where to map ahead next; STEER_NONE */
    _Atomic bool opened; /* the guest has been resumed here */
    _Atomic uint64_t bulk_next; /* flat page behind the last run that came by bulk, by whichever connection: where the next one is likely */
    bool recovering; /* a connection has been lost: not the first epoch (epoch.c) */
    uint64_t judged_final; /* by the stale set; only the loop of the first bulk connection, that takes it */
    bool removed_is_zero;  /* what a REMOVE event means for pages not here yet; else nothing */
    _Atomic uint32_t events_turn; /* odd: events have been read, or are being read, and are not all applied (discard.c) */
    struct waiting waiting;
    struct histogram latency[FAULT_KINDS];
#define X(name) _Atomic uint64_t name;
    DESTINATION_COUNTERS(X)
#undef X
};

/* The page states, all ABSENT, locked for this process. 0 or an errno. */
int states_init(struct destination *destination);
void states_deinit(struct destination *destination);

/* Bring one frame's pages, or its zeroes, to where faults end. False: result says why. */
bool destination_take_pages(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                            const char *bytes, enum page_path path, struct loop_result *result);
bool destination_take_zeroes(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                             enum page_path path, struct loop_result *result);

/* Map pages that are PRESENT (or the ZERO or REMOVED page at page_index) and let their faults run on. While the address space is
 * changing nothing can be mapped: who waits is woken and faults anew. */
bool destination_map_present(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                             struct loop_result *result);
bool destination_map_zero(struct destination *destination, const struct region *region, uint64_t page_index, struct loop_result *result);

/* A fault on a page that is LOST: SIGBUS, unless it has been unmapped meanwhile. */
bool destination_poison_again(struct destination *destination, const struct region *region, uint64_t page_index, struct loop_result *result);

/* What the file holds of an earlier copy of these pages goes: they read as zeroes then. They are claimed, or nobody's. 0 or an errno. */
int destination_clear_old(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count);
/* Pages of a REMOVE event (already a hole, or about to be one). */
bool destination_remove(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                        struct loop_result *result);
/* Leave a page that is claimed as REMOVED. */
bool destination_leave_removed(struct destination *destination, const struct region *region, uint64_t page_index,
                               struct loop_result *result);
/* What has come has been dropped: one page of it. */
void destination_count_dropped(struct destination *destination, enum page_path path);
/* By this path comes what was not asked for, or what came before. Always false. */
bool destination_refuse_copy(const struct destination *destination, const struct region *region, uint64_t page_index,
                             enum loop_reason reason, struct loop_result *result);
/* Around reading events, on the one thread that does, and before a claim is left whose bytes are in place (discard.c). */
void events_begin(struct destination *destination);
void events_end(struct destination *destination);
void events_applied(struct destination *destination);
/* What is there of faults and events, without waiting for any: read(2)'s answer. */
ssize_t events_read(const struct destination *destination, void *messages, size_t size_bytes);
/* When no loop reads them any more: read what is there and forget it. */
void events_drain(struct destination *destination);
/* So many pages more need nothing of the source. */
void destination_became_final(struct destination *destination, uint64_t page_count);

/* The page's fault has been resolved: record how long it took, if it was timed. */
void destination_end_wait(struct destination *destination, uint64_t page, enum fault_kind kind);

#endif
