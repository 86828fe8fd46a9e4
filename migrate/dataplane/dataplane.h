/* The whole C interface of the data plane. Python reaches it through cdef.txt, the C test main directly.
 *
 * A `destination` or a `source` is one migration's half. Its loops are plain blocking functions, each meant for a
 * thread of its own, and run until *_stop() or until they end by themselves with a typed loop_result. All figures are
 * atomics inside and may be read at any time from any thread. Nothing here knows of Python; nothing logs.
 *
 * Ownership: descriptors stay the caller's and must outlive the object; create allocates, destroy frees and must only
 * be called when every loop has returned. */
#ifndef POSTCOPY_DATAPLANE_H
#define POSTCOPY_DATAPLANE_H

#include <stdbool.h>
#include <stdint.h>

#include "histogram.h"

#define REGIONS_MAX 64
#define STREAMS_MAX 8 /* bulk connections of a migration */

/* One contiguous range of guest memory with one page size. */
struct memory_region {
    uint64_t guest_address; /* where the guest maps it; at the source only precopy needs it */
    uint64_t size_bytes;
    uint64_t offset_bytes; /* into the memory file */
    uint32_t page_bytes;   /* 4096, 2 MiB or 1 GiB */
    int32_t memory_fd;     /* memfd, tmpfs or hugetlbfs file */
};

enum loop_reason {
    LOOP_STOPPED = 0,           /* told to */
    LOOP_FINISHED = 1,          /* nothing is left to do (stream: every page has been sent) */
    LOOP_PEER_CLOSED = 2,       /* the connection ended in order, between two frames or inside one */
    LOOP_CONNECTION_FAILED = 3, /* error_number from the socket */
    LOOP_FRAME_INVALID = 4,     /* field, expected, got (enum frame_field) */
    LOOP_PAGE_UNASKED = 5,      /* a page on the urgent connection that was not requested */
    LOOP_PAGE_DUPLICATE = 6,    /* a page for the second time on bulk */
    LOOP_MEMORY_FAILED = 7,     /* error_number: the guest's memory file cannot be read or filled */
    LOOP_USERFAULTFD_FAILED = 8,/* error_number */
    LOOP_GUEST_GONE = 9,        /* the guest process has ended */
    LOOP_INCOMPLETE = 10,       /* destination_finish: page_index is not final */
    LOOP_TRACKING_FAILED = 11,  /* error_number from the guest's pagemap: what it writes cannot be seen */
};

struct loop_result {
    int32_t reason; /* enum loop_reason */
    int32_t error_number;
    uint32_t field;  /* enum frame_field */
    uint32_t region; /* of the frame or page at fault */
    uint64_t page_index;
    uint64_t expected;
    uint64_t got;
    char where[32]; /* the call that failed */
};

/* Pages of a region of guest memory, whoever has it: gone from its file, they read as zeroes. 0 or an errno. */
int memory_discard(const struct memory_region *region, uint64_t page_index, uint64_t page_count);

#define FORESEEN_MAX 64u

/* Pages of one region, one behind the other. */
struct page_run {
    uint32_t region;
    uint64_t page_index;
    uint64_t page_count;
};

enum fault_kind {
    FAULT_REMOTE = 0, /* the source had to be asked */
    FAULT_LOCAL = 1,  /* the content was here */
    FAULT_ZERO = 2,   /* known to be zero */
};
#define FAULT_KINDS 3

/* --- destination ------------------------------------------------------------------------------------------------- */

#define DESTINATION_COUNTERS(X)                                             \
    X(faults_remote) X(faults_local) X(faults_zero)                         \
    X(pages_urgent) X(pages_bulk)   /* placed, with content */              \
    X(pages_readahead)              /* the same, sent behind those that were asked for */ \
    X(pages_zero)                   /* told to be zero, by either path */   \
    X(pages_dropped)                /* came late: another copy was placed */ \
    X(pages_readahead_dropped)      /* of these, by readahead */            \
    X(bytes_urgent) X(bytes_bulk)   /* received, headers included */        \
    X(bytes_readahead)              /* of bytes_urgent */                   \
    X(pages_foreseen)               /* asked for before a fault: the guest had said that it stands there */ \
    X(faults_awaited)               /* remote, and bulk was about to bring the page: not asked for at once */ \
    X(pages_precopy) X(bytes_precopy) /* while the guest ran at the source: copies, zero pages among them */ \
    X(pages_held)                   /* distinct pages precopied */          \
    X(pages_stale) X(pages_kept)    /* of these, found stale, and found final with content */ \
    X(faults_held)                  /* remote, on a page held before the stale set had spoken */ \
    X(faults_unsettled)             /* remote, before the stale set had been applied; without precopy all of them */ \
    X(pages_stale_touched)          /* distinct pages, foreseen ones too, on which a fault waited once the stale set had named them */ \
    X(settled_ns)                   /* CLOCK_MONOTONIC: the stale set has been applied */ \
    X(pages_removed)                /* discarded by the guest before they had come */ \
    X(removes)                      /* REMOVE events read */                \
    X(pages_restored)               /* final already when a daemon took the guest back (destination_restore) */ \
    X(pages_final)                  /* present, mapped, zero or removed */  \
    X(pages_lost)                   /* given up: a touch is SIGBUS */       \
    X(requests_sent) X(requests_outstanding)                                \
    X(wakes)                        /* EEXIST: mapped already, woken */     \
    X(polled_ns)                    /* the fault loop looked instead of sleeping */ \
    X(faults_untimed)               /* more waiting than the table holds */

#define X(name) uint64_t name;
struct destination_figures {
    DESTINATION_COUNTERS(X)
    uint64_t pages_total;
};
#undef X

struct destination;

/* NULL with *error_number set: EINVAL (a region not of whole pages, or beyond its file's end), ENOMEM, or mmap's errno. */
struct destination *destination_create(const struct memory_region *regions, uint32_t region_count, int userfaultfd, int *error_number);
void destination_destroy(struct destination *destination);
/* Before the loops begin: the fault loop looks for so long before it sleeps, at most, as it adjusts itself; 0 (the default): not. */
void destination_poll(struct destination *destination, uint64_t poll_ns);
void destination_stop(struct destination *destination);
/* Readable once every page is final. */
int destination_final_fd(const struct destination *destination);

/* urgent_socket -1: between two epochs; faults on what is here are resolved, the others wait. */
void fault_loop(struct destination *destination, int urgent_socket, struct loop_result *result);
/* Before the loops begin: so many bulk connections there are, each with a receive_loop; 1 (the default) to STREAMS_MAX. */
void destination_streams(struct destination *destination, uint32_t streams);
/* Bulk connection `stream`, from 0. precopy: pages are held until the source's mark has come on it, then it parks until
 * destination_open, all but the first one until the stale set, which comes by that, has been applied. */
void receive_loop(struct destination *destination, int bulk_socket, uint32_t stream, bool precopy, struct loop_result *result);
/* Readable once the mark has come on every one: no precopied byte is in flight, their loops are parked. */
int destination_marked_fd(const struct destination *destination);
/* The guest has been resumed here: what comes unasked from now on is final. */
void destination_open(struct destination *destination);
/* Once, when the source's guest is paused for good: these pages, numbered through all regions, the guest will touch first, so they are
 * asked for before it does, all together, and mapped as they come. Beyond FORESEEN_MAX, outside of its memory, or large: not. */
void destination_foresee(struct destination *destination, const uint64_t *pages, uint32_t page_count);
/* Before the loops begin: a REMOVE event (MADV_REMOVE) makes pages that are not here yet zero. Without this it means nothing
 * (MADV_DONTNEED of shared memory, which raises the same event, keeps the data): events are only read. */
void destination_removed_is_zero(struct destination *destination);
/* The guest has discarded these pages and leaves them alone until this has returned: they are zero from then on, whether they are
 * here, on their way or still at the source. At any time once it has been resumed here. LOOP_FINISHED, or what is wrong. */
void destination_discard(struct destination *destination, uint32_t region, uint64_t page_index, uint64_t page_count,
                         struct loop_result *result);
/* While no loop runs, before a migration and after one that came to nothing: no byte is in the waiting memory, nothing of it is
 * mapped, and who waited for a page of it faults anew. LOOP_FINISHED, or what is wrong. */
void destination_clean(struct destination *destination, struct loop_result *result);
/* After that, before a migration: every huge page is allocated. LOOP_FINISHED, LOOP_STOPPED; LOOP_MEMORY_FAILED with ENOMEM or ENOSPC:
 * there is no room. Regions of 4 KiB pages take theirs as content comes. */
void destination_back(struct destination *destination, struct loop_result *result);

/* When every loop has returned because a connection was lost: the same loops may begin anew, with other connections or (the fault
 * loop) none. */
void destination_next_epoch(struct destination *destination);
/* The memfd of the page states, one byte a page, borrowed: the guest keeps it, and brings it back to a daemon that has been started
 * anew. It has none but this process's mapping that can write. */
int destination_states_fd(const struct destination *destination);
/* On a plane just created, instead of a first epoch: what an earlier daemon's states say, every byte of which may be anything. Then the guest gets
 * destination_states_fd, before a loop begins. LOOP_FINISHED, or what is wrong. */
void destination_restore(struct destination *destination, int states_fd, struct loop_result *result);
/* After that: whoever waits for a page faults anew, since that he did may have been read by a daemon that is gone. */
void destination_wake(struct destination *destination);
/* Be the one process that writes the guest's memory, for as long as states_fd or any other descriptor of the file is not closed here.
 * 0, or EAGAIN: *owner_pid is (0: unknown), or an errno. */
int states_lock(int states_fd, int *owner_pid);
/* There was no precopy, or its stale set has been applied: the source need not tell it again. */
bool destination_is_settled(const struct destination *destination);

/* The source is given up, beside a fault_loop without a connection, which goes on for as long as the guest lives: every page that is not
 * final is LOST, which a touch of it, also one that waits already, learns by SIGBUS; what is here is mapped; nothing is unregistered (P3).
 * May be called again, on a kernel that can (6.6). LOOP_FINISHED, or what is wrong. */
bool destination_can_abandon(const struct destination *destination);
void destination_abandon(struct destination *destination, struct loop_result *result);
/* What has been lost, in runs of pages: so many of them there are, the first ones, at most run_max, are told. */
uint64_t destination_lost(const struct destination *destination, struct page_run *runs, uint64_t run_max);

/* After the loops: check that every page is final, map what is only PRESENT, unregister. LOOP_FINISHED, or what is wrong;
 * on LOOP_INCOMPLETE nothing was unregistered (promise P3). */
void destination_finish(struct destination *destination, struct loop_result *result);

void destination_read(const struct destination *destination, struct destination_figures *figures);
void destination_latency(const struct destination *destination, uint32_t fault_kind, struct histogram_copy *copy);

/* --- source ------------------------------------------------------------------------------------------------------ */

#define SOURCE_COUNTERS(X)                                     \
    X(requests)                                                \
    X(pages_urgent) X(pages_bulk) X(pages_zero_urgent) X(pages_zero_bulk) \
    X(bytes_urgent) X(bytes_bulk) /* sent, headers included */ \
    X(pages_readahead) X(pages_zero_readahead) /* behind those that were asked for */ \
    X(bytes_readahead)            /* of bytes_urgent */ \
    X(pages_precopy) X(pages_zero_precopy) X(bytes_precopy)    \
    X(pages_pending)              /* precopy: to be sent in this round */ \
    X(pages_written) X(bytes_written) /* as the last precopy_count found */ \
    X(pages_stale)                /* written when the guest had been paused */ \
    X(pages_sent)                 /* distinct pages, by any path */ \
    X(polled_ns)                  /* the serve loop looked instead of sleeping */ \
    X(pace_waited_ns)             /* bulk was kept waiting for its turn, precopy too */ \
    X(steers)                     /* times bulk went on from a fault */

#define X(name) uint64_t name;
struct source_figures {
    SOURCE_COUNTERS(X)
    uint64_t pages_total;
};
#undef X

struct source;

struct source *source_create(const struct memory_region *regions, uint32_t region_count, int *error_number);
void source_destroy(struct source *source);
/* The same for the serve loop. */
void source_poll(struct source *source, uint64_t poll_ns);
/* Before the loops begin: no controller, bulk goes as fast as it can; only a limit holds. */
void source_unpaced(struct source *source);
/* At any time: bulk and precopy together go at most at so many bytes a second; 0, the default: at what the controller finds alone
 * (pacer.h). Answers and readahead are never kept waiting. */
void source_limit(struct source *source, uint64_t bytes_per_second);
/* Bytes a second at which bulk and precopy go now, at most; 0: as fast as they can. */
uint64_t source_pace(struct source *source);
void source_stop(struct source *source);
/* The guest is paused for good: its memory is final. Until then serve_loop answers nothing (promise P2). */
void source_open(struct source *source);
/* Before the loops begin and before precopy: so many bulk connections there are; 1 (the default) to STREAMS_MAX. */
void source_streams(struct source *source, uint32_t streams);
/* Let every stream_loop begin. */
void source_open_bulk(struct source *source);

/* Precopy, before the loops begin: pagemap_fd is the guest's /proc/self/pagemap, its memory registered for asynchronous write
 * protection. 0 or ENOMEM. Then, one after the other, each LOOP_FINISHED or what is wrong; precopy_send and precopy_end once
 * for each bulk connection, at the same time if the caller likes:
 *   precopy_check     before source_track: does this pagemap show what is written in all of the memory?
 *   precopy_arm       write-protect all; the first round is all pages
 *   precopy_send      send what is pending in this round and belongs to this connection (partition.h)
 *   precopy_count     how much has been written since (pages_written, bytes_written), and is all of it still tracked; nothing is changed
 *   precopy_collect   that is the next round
 *   precopy_end       the mark: no precopied page follows on this connection */
int source_track(struct source *source, int pagemap_fd);
void precopy_check(struct source *source, int pagemap_fd, struct loop_result *result);
void precopy_arm(struct source *source, struct loop_result *result);
void precopy_send(struct source *source, int bulk_socket, uint32_t stream, struct loop_result *result);
void precopy_count(struct source *source, struct loop_result *result);
void precopy_collect(struct source *source, struct loop_result *result);
void precopy_end(struct source *source, int bulk_socket, struct loop_result *result);

/* The guest has discarded these pages: a hole in the file. Scans are blind to that, so whatever has been sent of them is stale. */
void source_discarded(struct source *source, uint32_t region, uint64_t page_index, uint64_t page_count);

/* On a source just created for a guest that an earlier daemon had paused: what it knew of precopy is lost. */
void source_restarted(struct source *source);
/* When every loop has returned because a connection was lost: they may begin anew, with other connections. The destination says by
 * bulk what it lacks; settled: as destination_is_settled. */
void source_next_epoch(struct source *source, bool settled);

void serve_loop(struct source *source, int urgent_socket, struct loop_result *result);
/* Bulk connection `stream`, from 0. */
void stream_loop(struct source *source, int bulk_socket, uint32_t stream, struct loop_result *result);

void source_read(const struct source *source, struct source_figures *figures);

#endif
