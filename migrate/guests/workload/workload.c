/* See workload.h. The controlling thread's side: threads, gate, state. What the threads do is in worker.c. */
#include "workload.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "worker.h"

#define PAUSE_SPIN_NS 5000 /* threads on a CPU park within a step; only then is it worth going to sleep */

#define STATE_MAGIC UINT64_C(0x31746174536b7257) /* "WrkStat1", and the byte order */
#define STATE_VERSION 2

struct state_header {
    uint64_t magic;
    uint64_t checksum; /* of the whole state with 0 here; against accident, every field is checked besides */
    uint32_t version;
    uint32_t reserved;
    uint64_t memory_blocks;
    struct workload_config config;
};

struct state_worker {
    uint64_t root, random, stamped, steps, writes, discards;
    struct pattern_state pattern;
};

_Static_assert(sizeof(struct workload_config) == 40 && sizeof(struct state_header) == 72 && sizeof(struct state_worker) == 80,
               "the state has no padding");
_Static_assert(sizeof(struct state_header) + WORKLOAD_THREADS_MAX * sizeof(struct state_worker) <= WORKLOAD_STATE_BYTES_MAX,
               "the largest state fits");

struct workload *workload_create(void *memory, uint64_t size_bytes)
{
    uint64_t memory_blocks = size_bytes / WORKLOAD_BLOCK_BYTES;
    if (memory == NULL || (uintptr_t)memory % 8 != 0 || size_bytes % WORKLOAD_BLOCK_BYTES != 0 || memory_blocks < 2 ||
        memory_blocks > UINT32_MAX) {
        errno = EINVAL;
        return NULL;
    }
    struct workload *workload = calloc(1, sizeof *workload);
    uint32_t *seen = malloc(memory_blocks * sizeof *seen);
    int event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (workload == NULL || seen == NULL || event_fd < 0) {
        int failure = event_fd < 0 ? errno : ENOMEM;
        free(workload);
        free(seen);
        if (event_fd >= 0)
            close(event_fd);
        errno = failure;
        return NULL;
    }
    memset(seen, 0, memory_blocks * sizeof *seen); /* populated here, or its page faults would be among those measured */
    workload->memory = memory;
    workload->memory_blocks = memory_blocks;
    workload->event_fd = event_fd;
    workload->seen = seen;
    atomic_flag_clear(&workload->failure_claimed);
    for (uint32_t i = 0; i < WORKLOAD_THREADS_MAX; i++) {
        workload->worker[i].workload = workload;
        workload->worker[i].index = i;
    }
    return workload;
}

/* Ends and joins all threads; they are parked, or reach the gate after the step they are in. */
static void threads_end(struct workload *workload)
{
    atomic_store(&workload->gate, gate_generation(atomic_load(&workload->gate)) * GATE_PHASES + GATE_QUIT);
    futex_wake_all(&workload->gate);
    for (uint32_t i = 0; i < workload->threads; i++)
        pthread_join(workload->worker[i].thread, NULL);
    workload->threads = 0;
}

void workload_destroy(struct workload *workload)
{
    if (workload == NULL)
        return;
    threads_end(workload);
    close(workload->event_fd);
    free(workload->seen);
    free(workload);
}

static int thread_create(struct workload *workload, uint32_t index)
{
    struct worker *worker = &workload->worker[index];
    char name[16];
    atomic_store(&worker->acknowledged, gate_generation(atomic_load(&workload->gate)));
    int failure = pthread_create(&worker->thread, NULL, worker_main, worker);
    if (failure != 0)
        return -failure;
    snprintf(name, sizeof name, "workload-%u", index % WORKLOAD_THREADS_MAX); /* the bound tells the compiler that it fits */
    pthread_setname_np(worker->thread, name);
    workload->threads = index + 1;
    return 0;
}

/* Exactly `threads` threads, parked; the gate keeps its phase, IDLE or PAUSED (on failure: IDLE, no threads). */
static int threads_make(struct workload *workload, uint32_t threads)
{
    if (workload->threads == threads)
        return 0;
    uint32_t gate = atomic_load(&workload->gate);
    threads_end(workload);
    atomic_store(&workload->gate, gate);

    /* Signals belong to the threads of whoever embeds us; those that a touch of memory raises must reach the toucher. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGSEGV);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int result = 0;
    while (result == 0 && workload->threads < threads)
        result = thread_create(workload, workload->threads);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (result != 0) {
        threads_end(workload);
        atomic_store(&workload->gate, gate_generation(gate) * GATE_PHASES + WORKLOAD_IDLE);
    }
    return result;
}

static bool config_valid(const struct workload *workload, const struct workload_config *config)
{
    struct slice slice;
    return config->threads >= 1 && config->threads <= WORKLOAD_THREADS_MAX && config->pattern <= WORKLOAD_PERMUTE &&
           config->write_per_mille <= 1000 && config->zero_per_mille <= 1000 && config->discard_per_mille <= 1000 && config->reserved == 0 &&
           slice_init(&slice, workload->memory, workload->memory_blocks, config->threads, 0, config->seed);
}

/* Every worker as at the beginning of this configuration; all are parked. Costs nothing that grows with memory. */
static void configure(struct workload *workload, const struct workload_config *config)
{
    workload->config = *config;
    workload->interval_ns = config->rate_per_second == 0 ? 0 : config->threads * UINT64_C(1000000000) / config->rate_per_second;
    workload->write_below = ((uint64_t)config->write_per_mille << 32) / 1000;
    workload->discard_below = ((uint64_t)config->discard_per_mille << 32) / 1000;
    atomic_store(&workload->passes_wanted, 0);
    atomic_store(&workload->first_step_ns, 0);
    atomic_store(&workload->active, config->threads);
    for (uint32_t i = 0; i < config->threads; i++) {
        struct worker *worker = &workload->worker[i];
        uint64_t seed = mix64(config->seed) + i;
        slice_init(&worker->slice, workload->memory, workload->memory_blocks, config->threads, i, config->seed);
        pattern_init(&worker->pattern, config->pattern, worker->slice.data_blocks, seed);
        worker->random = ~mix64(seed);
        worker->root = worker->stamped = worker->unseen = worker->step_end_ns = 0;
        atomic_store(&worker->passes, 0);
        atomic_store(&worker->steps, 0);
        atomic_store(&worker->writes, 0);
        atomic_store(&worker->discards, 0);
        atomic_store(&worker->discarding, 0);
        atomic_store(&worker->last_step_ns, 0);
        histogram_clear(&worker->touch);
        histogram_clear(&worker->first_touch);
    }
}

/* Let all threads run from a gate at which they are parked. */
static void release(struct workload *workload, uint32_t generation)
{
    atomic_store(&workload->gate, generation * GATE_PHASES + WORKLOAD_RUNNING);
    futex_wake_all(&workload->gate);
}

int workload_prepare(struct workload *workload, uint32_t threads)
{
    if (threads < 1 || threads > WORKLOAD_THREADS_MAX)
        return -EINVAL;
    if (gate_phase(atomic_load(&workload->gate)) != WORKLOAD_IDLE)
        return -EBUSY;
    return threads_make(workload, threads);
}

int workload_start(struct workload *workload, const struct workload_config *config)
{
    uint32_t gate = atomic_load(&workload->gate);
    if (gate_phase(gate) != WORKLOAD_IDLE)
        return -EBUSY;
    if (!config_valid(workload, config))
        return -EINVAL;
    int result = threads_make(workload, config->threads);
    if (result != 0)
        return result;
    configure(workload, config);
    release(workload, gate_generation(gate));
    return 0;
}

static bool all_parked(const struct workload *workload, uint32_t generation)
{
    for (uint32_t i = 0; i < workload->threads; i++)
        if (atomic_load_explicit(&workload->worker[i].acknowledged, memory_order_acquire) != generation)
            return false;
    return true;
}

static int wait_parked(struct workload *workload, uint32_t pausing, uint64_t deadline_ns)
{
    uint64_t spin_end_ns = clock_monotonic_ns() + PAUSE_SPIN_NS;
    for (;;) {
        uint32_t arrivals = atomic_load(&workload->arrivals);
        if (atomic_load(&workload->gate) != pausing)
            return -EBADMSG; /* nobody but a failing thread moves it now */
        if (all_parked(workload, gate_generation(pausing)))
            return 0;
        uint64_t now_ns = clock_monotonic_ns();
        if (now_ns >= deadline_ns)
            return -ETIMEDOUT;
        if (now_ns >= spin_end_ns)
            futex_wait(&workload->arrivals, arrivals, deadline_ns);
    }
}

int workload_pause(struct workload *workload, uint64_t deadline_ns)
{
    uint32_t gate = atomic_load(&workload->gate);
    if (gate_phase(gate) == WORKLOAD_PAUSED)
        return 0;
    if (gate_phase(gate) == WORKLOAD_FAILED)
        return -EBADMSG;
    if (gate_phase(gate) != WORKLOAD_RUNNING)
        return -EINVAL;
    uint32_t generation = (gate_generation(gate) + 1) % (UINT32_MAX / GATE_PHASES);
    uint32_t pausing = generation * GATE_PHASES + GATE_PAUSING;
    if (!atomic_compare_exchange_strong(&workload->gate, &gate, pausing))
        return -EBADMSG;
    futex_wake_all(&workload->gate); /* those that wait for their rate */

    int result = wait_parked(workload, pausing, deadline_ns);
    if (result == 0 && !atomic_compare_exchange_strong(&workload->gate, &pausing, generation * GATE_PHASES + WORKLOAD_PAUSED))
        return -EBADMSG;
    if (result == -ETIMEDOUT) {
        if (!atomic_compare_exchange_strong(&workload->gate, &pausing, generation * GATE_PHASES + WORKLOAD_RUNNING))
            return -EBADMSG;
        futex_wake_all(&workload->gate);
    }
    return result;
}

int workload_resume(struct workload *workload)
{
    uint32_t gate = atomic_load(&workload->gate);
    if (gate_phase(gate) != WORKLOAD_PAUSED)
        return gate_phase(gate) == WORKLOAD_FAILED ? -EBADMSG : -EINVAL;
    atomic_store(&workload->first_step_ns, 0);
    release(workload, gate_generation(gate));
    return 0;
}

static uint64_t checksum(const uint8_t *state, size_t size_bytes)
{
    uint64_t sum = mix64(size_bytes), word;
    for (size_t offset = 0; offset < size_bytes; offset += sizeof word) {
        memcpy(&word, state + offset, sizeof word);
        if (offset != offsetof(struct state_header, checksum))
            sum = mix64(sum ^ word);
    }
    return sum;
}

int64_t workload_save(const struct workload *workload, uint8_t *state, size_t capacity_bytes)
{
    uint32_t phase = gate_phase(atomic_load(&workload->gate));
    if (phase != WORKLOAD_PAUSED)
        return phase == WORKLOAD_FAILED ? -EBADMSG : -EINVAL;
    struct state_header header = {
        .magic = STATE_MAGIC, .version = STATE_VERSION, .memory_blocks = workload->memory_blocks, .config = workload->config,
    };
    size_t size_bytes = sizeof header + workload->threads * sizeof(struct state_worker);
    if (capacity_bytes < size_bytes)
        return -ENOSPC;
    for (uint32_t i = 0; i < workload->threads; i++) {
        const struct worker *worker = &workload->worker[i];
        struct state_worker saved = {
            .root = worker->root, .random = worker->random, .stamped = worker->stamped, .pattern = worker->pattern.state,
            .steps = atomic_load(&worker->steps), .writes = atomic_load(&worker->writes),
            .discards = atomic_load(&worker->discards),
        };
        memcpy(state + sizeof header + i * sizeof saved, &saved, sizeof saved);
    }
    memcpy(state, &header, sizeof header);
    header.checksum = checksum(state, size_bytes);
    memcpy(state, &header, sizeof header);
    return (int64_t)size_bytes;
}

static bool state_valid(const struct workload *workload, const struct state_header *header, const uint8_t *state,
                        size_t size_bytes)
{
    if (header->magic != STATE_MAGIC || header->version != STATE_VERSION || header->memory_blocks != workload->memory_blocks ||
        !config_valid(workload, &header->config) ||
        size_bytes != sizeof *header + header->config.threads * sizeof(struct state_worker) ||
        header->checksum != checksum(state, size_bytes))
        return false;
    for (uint32_t i = 0; i < header->config.threads; i++) {
        struct state_worker saved;
        struct slice slice;
        memcpy(&saved, state + sizeof *header + i * sizeof saved, sizeof saved);
        slice_init(&slice, workload->memory, workload->memory_blocks, header->config.threads, i, header->config.seed);
        if (saved.stamped > slice.data_blocks || saved.pattern.position >= slice.data_blocks)
            return false;
    }
    return true;
}

int workload_load(struct workload *workload, const uint8_t *state, size_t size_bytes)
{
    struct state_header header;
    uint32_t gate = atomic_load(&workload->gate);
    if (gate_phase(gate) != WORKLOAD_IDLE && gate_phase(gate) != WORKLOAD_PAUSED)
        return -EBUSY;
    if (size_bytes < sizeof header)
        return -EINVAL;
    memcpy(&header, state, sizeof header);
    if (!state_valid(workload, &header, state, size_bytes))
        return -EINVAL;
    int result = threads_make(workload, header.config.threads);
    if (result != 0)
        return result;
    configure(workload, &header.config);
    workload->epoch++;
    for (uint32_t i = 0; i < header.config.threads; i++) {
        struct worker *worker = &workload->worker[i];
        struct state_worker saved;
        memcpy(&saved, state + sizeof header + i * sizeof saved, sizeof saved);
        worker->root = saved.root;
        worker->random = saved.random;
        worker->stamped = saved.stamped;
        worker->pattern.state = saved.pattern;
        worker->unseen = worker->slice.table_blocks + worker->slice.data_blocks;
        atomic_store(&worker->steps, saved.steps);
        atomic_store(&worker->writes, saved.writes);
        atomic_store(&worker->discards, saved.discards);
    }
    atomic_store(&workload->gate, gate_generation(gate) * GATE_PHASES + WORKLOAD_PAUSED);
    return 0;
}

void workload_verify(struct workload *workload)
{
    atomic_fetch_add(&workload->passes_wanted, 1);
    futex_wake_all(&workload->gate); /* those that wait for their rate */
}

void workload_reset_touches(struct workload *workload)
{
    for (uint32_t i = 0; i < atomic_load(&workload->active); i++) {
        histogram_clear(&workload->worker[i].touch);
        histogram_clear(&workload->worker[i].first_touch);
    }
}

void workload_tell_discards(struct workload *workload, bool tell)
{
    atomic_store(&workload->tell_discards, tell);
}

uint32_t workload_discards(struct workload *workload, uint64_t block_index[WORKLOAD_THREADS_MAX])
{
    uint32_t found = 0;
    for (uint32_t i = 0; i < atomic_load(&workload->active); i++) {
        uint64_t discarding = atomic_load(&workload->worker[i].discarding);
        if (discarding == 0 || discarding % 2 == 1)
            continue;
        atomic_store(&workload->worker[i].discarding, discarding + 1); /* its thread waits for us */
        block_index[found++] = discarding / 2 - 1;
    }
    return found;
}

void workload_discarded(struct workload *workload)
{
    for (uint32_t i = 0; i < atomic_load(&workload->active); i++)
        if (atomic_load(&workload->worker[i].discarding) % 2 == 1)
            atomic_store(&workload->worker[i].discarding, 0);
    futex_wake_all(&workload->gate);
}

int workload_event_fd(const struct workload *workload)
{
    return workload->event_fd;
}

uint64_t workload_last_step_ns(const struct workload *workload)
{
    uint64_t last_step_ns = 0;
    for (uint32_t i = 0; i < atomic_load(&workload->active); i++) {
        uint64_t step_ns = atomic_load(&workload->worker[i].last_step_ns);
        last_step_ns = step_ns > last_step_ns ? step_ns : last_step_ns;
    }
    return last_step_ns;
}

uint64_t workload_first_step_ns(const struct workload *workload)
{
    return atomic_load(&workload->first_step_ns);
}

uint64_t workload_steps(const struct workload *workload)
{
    uint64_t steps = 0;
    for (uint32_t i = 0; i < atomic_load(&workload->active); i++)
        steps += atomic_load(&workload->worker[i].steps);
    return steps;
}

void workload_read(const struct workload *workload, struct workload_report *report)
{
    uint32_t phase = gate_phase(atomic_load(&workload->gate));
    uint32_t active = atomic_load(&workload->active);
    memset(report, 0, sizeof *report);
    report->phase = phase == GATE_PAUSING ? WORKLOAD_RUNNING : phase == GATE_QUIT ? WORKLOAD_IDLE : phase;
    report->first_step_ns = workload_first_step_ns(workload);
    report->last_step_ns = workload_last_step_ns(workload);
    report->verifications = active != 0 ? UINT32_MAX : 0;
    for (uint32_t i = 0; i < active; i++) {
        const struct worker *worker = &workload->worker[i];
        struct histogram_copy copy;
        uint32_t passes = atomic_load(&worker->passes);
        report->verifications = passes < report->verifications ? passes : report->verifications;
        report->steps += atomic_load(&worker->steps);
        report->writes += atomic_load(&worker->writes);
        report->discards += atomic_load(&worker->discards);
        histogram_read(&worker->touch, &copy);
        histogram_add(&report->touch, &copy);
        histogram_read(&worker->first_touch, &copy);
        histogram_add(&report->first_touch, &copy);
    }
    if (phase == WORKLOAD_FAILED)
        report->failure = workload->failure;
}
