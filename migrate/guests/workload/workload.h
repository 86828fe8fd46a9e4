/* The built-in guest: native threads that work on the guest memory, check every page they touch and time the touch.
 *
 * What a page must hold hangs on a root that never lives in guest memory: the table of versions does, the sum over
 * it travels in `state`. So not even a consistent rollback of all memory goes unseen. C alone; no lock on a step. */
#ifndef POSTCOPY_WORKLOAD_H
#define POSTCOPY_WORKLOAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "histogram.h"

#define WORKLOAD_THREADS_MAX 64
#define WORKLOAD_STATE_BYTES_MAX 65536
#define WORKLOAD_BLOCK_BYTES 4096 /* the unit that is stamped and checked, whatever the page size below it */

enum workload_pattern {
    WORKLOAD_SEQUENTIAL = 0,
    WORKLOAD_RANDOM = 1,
    WORKLOAD_ZIPF = 2,
    WORKLOAD_CHASE = 3,   /* pointer-chase: the next block depends on what the last one holds */
    WORKLOAD_PERMUTE = 4, /* every block of a thread's slice once, in a random order, then again in another */
};

struct workload_config {
    uint64_t seed;
    uint64_t rate_per_second; /* steps of all threads together; 0: flat out */
    uint32_t threads;
    uint32_t pattern;          /* enum workload_pattern */
    uint32_t write_per_mille;  /* share of steps that also write */
    uint32_t zero_per_mille;   /* share of blocks never written at the start: they read zero */
    uint32_t discard_per_mille; /* share of steps that discard their block (MADV_REMOVE): it reads zero until it is written again */
    uint32_t reserved;         /* 0 */
};

enum workload_failure_kind {
    WORKLOAD_INTACT = 0,
    WORKLOAD_PAGE_LOST = 1,     /* content of no page and no version */
    WORKLOAD_PAGE_STALE = 2,    /* this page, whole, as it was some versions ago */
    WORKLOAD_PAGE_TORN = 3,     /* part of one version, part of another */
    WORKLOAD_PAGE_SWAPPED = 4,  /* another page's content */
    WORKLOAD_PAGE_ZEROED = 5,   /* zeroes where something was written */
    WORKLOAD_WRITE_LOST = 6,    /* the page counts fewer writes than were made */
    WORKLOAD_WRITE_REPEATED = 7, /* the page counts more writes than were made */
    WORKLOAD_ROLLED_BACK = 8,   /* pages and table agree with each other and not with the root */
    WORKLOAD_PAGE_GONE = 9,     /* a touch was SIGBUS: it has been given up, or its file has been truncated */
};

struct workload_failure {
    uint32_t kind;       /* enum workload_failure_kind */
    uint32_t thread;
    uint64_t block_index; /* offset in guest memory / WORKLOAD_BLOCK_BYTES; of a rollback: first block of the slice */
    uint64_t block_count; /* 1; of a rollback: blocks of the slice */
    uint64_t expected;    /* version; write count if writes were lost or repeated; block index if swapped; root of a rollback */
    uint64_t got;         /* likewise */
};

enum workload_phase { WORKLOAD_IDLE = 0, WORKLOAD_RUNNING = 1, WORKLOAD_PAUSED = 2, WORKLOAD_FAILED = 3 };

struct workload_report {
    uint32_t phase;
    uint32_t verifications; /* whole passes finished by all threads since the last load/start */
    uint64_t steps;         /* since the guest's start, on whichever host: carried in the state */
    uint64_t writes;        /* likewise; without the first stamping */
    uint64_t discards;      /* likewise */
    uint64_t last_step_ns;  /* CLOCK_MONOTONIC end of the last step completed before the pause; 0: none */
    uint64_t first_step_ns; /* end of the first step completed since the last resume; 0: none yet */
    struct workload_failure failure;
    struct histogram_copy touch;       /* every touch of a block (a step makes two: table and data) since start, load or reset */
    struct histogram_copy first_touch; /* each block's first touch since the last load: what a demand fault costs */
};

struct workload;

/* workload_read, _steps, _verify, _reset_touches and _event_fd may be called by any thread at any time; the others by one thread at
 * a time. What returns int answers 0 or a negative errno: -EBADMSG once a check has failed (report.failure says
 * which), -EINVAL and -EBUSY out of turn. Nothing from pause to resume costs more for more memory. */

/* memory: size_bytes of mapped guest memory (whole blocks, at least two a thread), never touched here before start or
 * resume. NULL with errno on failure. */
struct workload *workload_create(void *memory, uint64_t size_bytes);
void workload_destroy(struct workload *workload); /* stops and joins the threads; memory stays the caller's */

/* Idle only: make the threads ahead of time, parked, so that a load of a guest of as many only has to wake them. */
int workload_prepare(struct workload *workload, uint32_t threads);
/* Idle only; memory must read zero. Returns at once: the threads stamp the memory, each its part, and then step.
 * -EINVAL: a config out of range, or too many threads for the memory; -EAGAIN: no more threads to be had. */
int workload_start(struct workload *workload, const struct workload_config *config);
/* Stop every thread between two steps; -ETIMEDOUT when one stays in a fault beyond deadline_ns (CLOCK_MONOTONIC): all
 * run on then. Paused already: 0. */
int workload_pause(struct workload *workload, uint64_t deadline_ns);
/* Paused only: what the guest needs to run on elsewhere; returns bytes written or a negative errno (-ENOSPC). */
int64_t workload_save(const struct workload *workload, uint8_t *state, size_t capacity_bytes);
/* Idle or paused only: take a saved state over; paused then (threads are made here, parked, unless as many are there).
 * -EINVAL: not a state, another version, or for another memory size. Touches no guest memory. */
int workload_load(struct workload *workload, const uint8_t *state, size_t size_bytes);
int workload_resume(struct workload *workload);
/* Ask every thread to check its whole slice and the root once, between its steps; counted in report.verifications. A
 * pass that a pause interrupts starts again at the resume. Forgotten by start and load. */
void workload_verify(struct workload *workload);
void workload_reset_touches(struct workload *workload);
/* Whether discards are to be told: then a thread that has discarded a block does nothing before workload_discarded. Not told is what
 * the kernel tells by itself, as an event. */
void workload_tell_discards(struct workload *workload, bool tell);
/* Blocks discarded and not returned here before, one a thread at most; how many. */
uint32_t workload_discards(struct workload *workload, uint64_t block_index[WORKLOAD_THREADS_MAX]);
/* All that have been returned are known where they have to be. */
void workload_discarded(struct workload *workload);
/* Readable (eventfd) after: a first step since resume, a finished verification, a failure, a discard to be told. Read it, then the report. */
int workload_event_fd(const struct workload *workload);
/* Just the two times of the report: read within a downtime. */
uint64_t workload_last_step_ns(const struct workload *workload);
uint64_t workload_first_step_ns(const struct workload *workload);
uint64_t workload_steps(const struct workload *workload); /* of the report likewise: cheap enough to be read every millisecond */
void workload_read(const struct workload *workload, struct workload_report *report);

#endif
