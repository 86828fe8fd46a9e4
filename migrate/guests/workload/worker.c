/* What one thread of the guest does: steps, verification, parking. See worker.h for the gate, verify.h for the blocks.
 *
 * A step reads the clock three times (its start is the end of the one before): after the table entry's first word,
 * after the block's first word, at the end. Nothing on it locks, allocates or enters the kernel, page faults apart. */
#include "gone.h"

#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VERIFY_BLOCKS_PER_STEP 32         /* so that the guest also steps while it verifies */
#define ARREARS_MAX_NS UINT64_C(10000000) /* steps missed in longer stalls are not made up for */
#define WAIT_MAX_NS UINT64_C(10000000)    /* a wish to verify that just missed a sleeper's look is seen by then */

void futex_wait(const _Atomic uint32_t *word, uint32_t value, uint64_t deadline_ns)
{
    struct timespec deadline = {
        .tv_sec = (time_t)(deadline_ns / 1000000000u),
        .tv_nsec = (long)(deadline_ns % 1000000000u),
    };
    /* BITSET: the variant whose timeout is absolute, on CLOCK_MONOTONIC. */
    syscall(SYS_futex, word, FUTEX_WAIT_BITSET_PRIVATE, value, deadline_ns == UINT64_MAX ? NULL : &deadline, NULL,
            FUTEX_BITSET_MATCH_ANY);
}

void futex_wake_all(const _Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT32_MAX, NULL, NULL, 0);
}

static void signal_event(const struct workload *workload)
{
    uint64_t one = 1;
    if (write(workload->event_fd, &one, sizeof one) < 0)
        return; /* EAGAIN alone: it is readable already */
}

static void add_one(_Atomic uint64_t *counter)
{
    /* One writer: a load and a store do, without the price of an atomic addition. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + 1, memory_order_relaxed);
}

static void fail(struct worker *worker, struct workload_failure *failure)
{
    struct workload *workload = worker->workload;
    if (atomic_flag_test_and_set(&workload->failure_claimed))
        return; /* another thread was first, and stops this one too */
    failure->thread = worker->index;
    workload->failure = *failure;
    uint32_t gate = atomic_load(&workload->gate);
    do {
        if (gate_phase(gate) == GATE_QUIT)
            return;
    } while (!atomic_compare_exchange_weak(&workload->gate, &gate, gate_generation(gate) * GATE_PHASES + WORKLOAD_FAILED));
    futex_wake_all(&workload->gate);
    signal_event(workload);
}

static void record(struct worker *worker, uint64_t block, uint64_t elapsed_ns)
{
    histogram_record(&worker->touch, elapsed_ns);
    uint32_t *seen = worker->workload->seen, epoch = worker->workload->epoch;
    if (worker->unseen == 0 || seen[block] == epoch)
        return;
    seen[block] = epoch;
    worker->unseen--;
    histogram_record(&worker->first_touch, elapsed_ns);
}

/* Touch entry and block, timed, and check them. *now_ns: the time before, then that after the touches. */
static bool touch(struct worker *worker, uint64_t data_index, uint64_t *entry, uint64_t *now_ns)
{
    const struct slice *slice = &worker->slice;
    *entry = *(const volatile uint64_t *)slice_entry(slice, data_index);
    uint64_t entry_ns = clock_monotonic_ns();
    (void)*(const volatile uint64_t *)slice_words(slice, data_index);
    uint64_t block_ns = clock_monotonic_ns();
    record(worker, slice_table_block(slice, data_index), entry_ns - *now_ns);
    record(worker, slice_data_block(slice, data_index), block_ns - entry_ns);
    *now_ns = block_ns;
    if (block_matches(slice, data_index, *entry))
        return true;
    struct workload_failure failure = {0};
    block_classify(slice, data_index, *entry, &failure);
    fail(worker, &failure);
    return false;
}

static void entry_changed(struct worker *worker, uint64_t data_index, uint64_t before, uint64_t after)
{
    const struct slice *slice = &worker->slice;
    uint64_t change = root_share(slice, data_index, after) - root_share(slice, data_index, before);
    worker->root += change;
    if (data_index < worker->pass_cursor) /* the pass under way has counted the old entry */
        worker->pass_sum += change;
}

static void write_block(struct worker *worker, uint64_t data_index, uint64_t entry)
{
    entry_changed(worker, data_index, entry, block_write(&worker->slice, data_index, entry));
}

/* The block is as if never written; it is not looked at before, so that it may be one that has not come yet. Where a discard has to
 * be told, run() leaves all alone until it is known. */
static void discard_block(struct worker *worker, uint64_t data_index)
{
    struct workload *workload = worker->workload;
    uint64_t entry = *slice_entry(&worker->slice, data_index);
    if (madvise(slice_words(&worker->slice, data_index), WORKLOAD_BLOCK_BYTES, MADV_REMOVE) != 0)
        return; /* not memory that can be discarded: report.discards stays 0 */
    add_one(&worker->discards);
    if (atomic_load(&workload->tell_discards)) {
        atomic_store(&worker->discarding, (slice_data_block(&worker->slice, data_index) + 1) * 2);
        signal_event(workload);
    }
    *slice_entry(&worker->slice, data_index) = 0;
    entry_changed(worker, data_index, entry, 0);
}

static void first_step(struct worker *worker, uint64_t end_ns)
{
    _Atomic uint64_t *first_step_ns = &worker->workload->first_step_ns;
    uint64_t first_ns = atomic_load(first_step_ns);
    worker->stepped = true;
    while (first_ns == 0 || end_ns < first_ns) {
        bool first = first_ns == 0;
        if (atomic_compare_exchange_weak(first_step_ns, &first_ns, end_ns)) {
            if (first)
                signal_event(worker->workload);
            return;
        }
    }
}

/* One step; returns the time of its end. */
static uint64_t step(struct worker *worker, uint64_t now_ns)
{
    uint64_t entry, data_index = pattern_next(&worker->pattern);
    uint64_t draw = mix64(worker->random += UINT64_C(0x9e3779b97f4a7c15));
    if ((draw & UINT32_MAX) < worker->workload->discard_below) {
        discard_block(worker, data_index);
    } else {
        if (!touch(worker, data_index, &entry, &now_ns))
            return now_ns;
        worker->pattern.state.carried = slice_words(&worker->slice, data_index)[BLOCK_WORDS - 1];
        if (draw >> 32 < worker->workload->write_below) {
            write_block(worker, data_index, entry);
            add_one(&worker->writes);
        }
    }
    add_one(&worker->steps);
    worker->step_end_ns = clock_monotonic_ns();
    if (!worker->stepped)
        first_step(worker, worker->step_end_ns);
    return worker->step_end_ns;
}

static void stamp_next(struct worker *worker)
{
    uint64_t data_index = worker->stamped++;
    if (!block_starts_zero(&worker->slice, data_index, worker->workload->config.zero_per_mille))
        write_block(worker, data_index, 0);
}

static bool pass_wanted(const struct worker *worker)
{
    uint32_t done = atomic_load_explicit(&worker->passes, memory_order_relaxed);
    return atomic_load_explicit(&worker->workload->passes_wanted, memory_order_relaxed) != done;
}

static void pass_end(struct worker *worker)
{
    struct workload *workload = worker->workload;
    const struct slice *slice = &worker->slice;
    bool rolled_back = worker->pass_sum != worker->root;
    struct workload_failure failure = {
        .kind = WORKLOAD_ROLLED_BACK, .block_index = slice->first_block,
        .block_count = slice->table_blocks + slice->data_blocks, .expected = worker->root, .got = worker->pass_sum,
    };
    worker->pass_cursor = worker->pass_sum = 0;
    if (rolled_back) {
        fail(worker, &failure);
        return;
    }
    uint32_t done = atomic_fetch_add(&worker->passes, 1) + 1;
    for (uint32_t i = 0; i < atomic_load(&workload->active); i++)
        if ((int32_t)(atomic_load(&workload->worker[i].passes) - done) < 0)
            return; /* whoever is last says so */
    signal_event(workload);
}

/* A run of blocks of the verification under way; stops early at the gate. */
static void verify_some(struct worker *worker, uint32_t running)
{
    uint64_t now_ns = clock_monotonic_ns();
    for (uint32_t i = 0; i < VERIFY_BLOCKS_PER_STEP; i++) {
        uint64_t entry, data_index = worker->pass_cursor;
        if (atomic_load_explicit(&worker->workload->gate, memory_order_relaxed) != running)
            return;
        if (!touch(worker, data_index, &entry, &now_ns))
            return;
        worker->pass_sum += root_share(&worker->slice, data_index, entry);
        if (++worker->pass_cursor == worker->slice.data_blocks) {
            pass_end(worker);
            return;
        }
        now_ns = clock_monotonic_ns();
    }
}

/* Work until the gate is no longer `running`. */
static void run(struct worker *worker, uint32_t running)
{
    struct workload *workload = worker->workload;
    uint64_t interval_ns = workload->interval_ns;
    uint64_t now_ns = clock_monotonic_ns();
    worker->due_ns = now_ns; /* the first step at once: downtime is not to hold a wait of ours */
    worker->stepped = false;
    worker->pass_cursor = worker->pass_sum = 0; /* what an abandoned pass saw may have changed since */

    while (atomic_load_explicit(&workload->gate, memory_order_acquire) == running) {
        if (atomic_load(&worker->discarding) != 0) { /* woken by workload_discarded */
            futex_wait(&workload->gate, running, now_ns + WAIT_MAX_NS);
            now_ns = clock_monotonic_ns();
            continue;
        }
        if (worker->stamped < worker->slice.data_blocks) {
            stamp_next(worker);
            now_ns = clock_monotonic_ns();
            continue;
        }
        if (now_ns >= worker->due_ns) {
            now_ns = step(worker, now_ns);
            uint64_t due_ns = worker->due_ns + interval_ns;
            worker->due_ns = due_ns + ARREARS_MAX_NS < now_ns ? now_ns : due_ns;
        }
        if (pass_wanted(worker)) {
            verify_some(worker, running);
            now_ns = clock_monotonic_ns();
        } else if (now_ns < worker->due_ns) {
            uint64_t latest_ns = now_ns + WAIT_MAX_NS;
            futex_wait(&workload->gate, running, worker->due_ns < latest_ns ? worker->due_ns : latest_ns);
            now_ns = clock_monotonic_ns();
        }
    }
}

/* Wait at the gate; returns it once it says RUNNING or QUIT. */
static uint32_t park(struct worker *worker)
{
    struct workload *workload = worker->workload;
    for (;;) {
        uint32_t gate = atomic_load_explicit(&workload->gate, memory_order_acquire);
        if (gate_phase(gate) == WORKLOAD_RUNNING || gate_phase(gate) == GATE_QUIT)
            return gate;
        if (atomic_load_explicit(&worker->acknowledged, memory_order_relaxed) != gate_generation(gate)) {
            atomic_store_explicit(&worker->last_step_ns, worker->step_end_ns, memory_order_relaxed);
            atomic_store_explicit(&worker->acknowledged, gate_generation(gate), memory_order_release);
            atomic_fetch_add(&workload->arrivals, 1);
            futex_wake_all(&workload->arrivals);
        }
        futex_wait(&workload->gate, gate, UINT64_MAX);
    }
}

static void work(struct worker *worker)
{
    for (;;) {
        uint32_t gate = park(worker);
        if (gate_phase(gate) == GATE_QUIT)
            return;
        run(worker, gate);
    }
}

void *worker_main(void *argument)
{
    struct worker *worker = argument;
    gone_watch(worker);
    if (sigsetjmp(worker->gone, 1) != 0) {
        struct workload_failure failure = {.kind = WORKLOAD_PAGE_GONE, .block_index = worker->gone_block, .block_count = 1};
        fail(worker, &failure);
    }
    work(worker);
    return NULL;
}
