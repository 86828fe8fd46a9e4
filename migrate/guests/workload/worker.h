/* A workload's threads and the gate they run behind. Internal to the workload.
 *
 * gate = generation * GATE_PHASES + phase, one futex word. A worker looks at it between two steps (and between two blocks
 * of a verification, and sleeps on it when it waits for its rate): any value but the one it was released with parks
 * it. Parked, it stores the gate's generation as acknowledged (release); all acknowledgements together are the pause.
 * The generation grows with each pause, so that one that timed out leaves nothing behind that counts for the next.
 * What a worker owns is touched by the controlling thread only while it is parked. */
#ifndef POSTCOPY_WORKLOAD_WORKER_H
#define POSTCOPY_WORKLOAD_WORKER_H

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>

#include "futex.h"
#include "pattern.h"
#include "verify.h"
#include "workload.h"

/* Beyond enum workload_phase, in the gate only. */
enum { GATE_PAUSING = 4, GATE_QUIT = 5, GATE_PHASES = 8 };

struct workload;

struct worker {
    struct workload *workload;
    pthread_t thread;
    uint32_t index;

    /* Owned by the thread while it runs. */
    struct slice slice;
    struct pattern pattern;
    uint64_t random; /* the write decision's own, so that the order of blocks does not depend on the write share */
    uint64_t root;
    uint64_t stamped;      /* data blocks that were given their first content */
    uint64_t unseen;       /* blocks of the slice not touched since the load; 0 after a start */
    uint64_t pass_cursor;  /* verification: blocks done, and their part of the root */
    uint64_t pass_sum;
    uint64_t due_ns;       /* next step, with a rate */
    uint64_t step_end_ns;
    bool stepped;          /* since the resume */
    sigjmp_buf gone;       /* where a touch that was SIGBUS goes on, and its block */
    uint64_t gone_block;

    /* Written by the thread, read by anyone. */
    _Atomic uint32_t acknowledged;
    _Atomic uint32_t passes; /* verifications finished */
    _Atomic uint64_t steps;
    _Atomic uint64_t writes;
    _Atomic uint64_t discards;
    _Atomic uint64_t discarding; /* (block + 1) * 2 once discarded, + 1 once told; 0: nothing that the thread waits for */
    _Atomic uint64_t last_step_ns; /* published when parking */
    struct histogram touch;        /* each longer than a cache line: workers share none */
    struct histogram first_touch;
};

struct workload {
    void *memory;
    uint64_t memory_blocks;
    int event_fd;
    struct workload_config config;
    uint64_t interval_ns; /* between two steps of one thread; 0: flat out */
    uint64_t write_below; /* a random number below it: this step writes */
    uint64_t discard_below; /* likewise */
    uint32_t threads;     /* that exist */
    uint32_t epoch;       /* of loads */
    uint32_t *seen;       /* by block: the epoch of its last first touch, so that a load clears nothing */

    _Atomic uint32_t gate;
    _Atomic uint32_t arrivals; /* futex of the pauser: a worker has parked */
    _Atomic uint32_t active;   /* workers a report covers */
    _Atomic uint32_t passes_wanted;
    _Atomic uint64_t first_step_ns;
    _Atomic bool tell_discards;
    atomic_flag failure_claimed;
    struct workload_failure failure; /* final once the gate says FAILED */

    struct worker worker[WORKLOAD_THREADS_MAX];
};

static inline uint32_t gate_phase(uint32_t gate)
{
    return gate % GATE_PHASES;
}

static inline uint32_t gate_generation(uint32_t gate)
{
    return gate / GATE_PHASES;
}

/* A thread's whole life; argument: its struct worker. */
void *worker_main(void *argument);

#endif
