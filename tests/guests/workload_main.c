/* The built-in guest without Python: its threads under a plain C main, so that sanitizers see them.
 *   workload-main [BLOCKS [ROUNDS]]
 * For each pattern a guest starts, and then goes to and fro between two memories: pause, save, copy, load, resume, verify;
 * all the while another thread reads its report, as a daemon does. At the end damage is injected and must be found.
 * Exit 0: every guest verified itself, and the damaged one named the block. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "workload.h"
#include "../check.h"

#define THREADS 3
#define PAUSE_DEADLINE_NS UINT64_C(20000000000)
#define PROGRAM_DEADLINE_SECONDS 110

struct host {
    char *memory;
    struct workload *workload;
};

/* Reads whichever host's report, until told to stop. */
struct reader {
    const struct host *hosts;
    _Atomic int stop;
    pthread_t thread;
};

static void *run_reader(void *of)
{
    struct reader *reader = of;
    struct workload_report report;
    while (!atomic_load(&reader->stop)) {
        for (int i = 0; i < 2; i++) {
            workload_read(reader->hosts[i].workload, &report);
            CHECK(report.phase <= WORKLOAD_FAILED);
        }
        workload_reset_touches(reader->hosts[0].workload);
    }
    return NULL;
}

static uint64_t deadline_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000 + (uint64_t)now.tv_nsec + PAUSE_DEADLINE_NS;
}

/* Until a whole verification is through or a check failed; the program's alarm is the deadline. */
static struct workload_report verified_or_failed(const struct host *host)
{
    struct workload_report before, report;
    workload_read(host->workload, &before);
    workload_verify(host->workload);
    for (;;) {
        workload_read(host->workload, &report);
        if (report.verifications > before.verifications || report.phase == WORKLOAD_FAILED)
            return report;
        struct pollfd event = {.fd = workload_event_fd(host->workload), .events = POLLIN};
        uint64_t value;
        CHECK(poll(&event, 1, -1) == 1);
        CHECK(read(event.fd, &value, sizeof value) == sizeof value || errno == EAGAIN);
    }
}

static void move(const struct host *from, const struct host *to, uint64_t size_bytes)
{
    static uint8_t state[WORKLOAD_STATE_BYTES_MAX];
    struct workload_report left, arrived;
    CHECK(workload_pause(from->workload, deadline_ns()) == 0);
    int64_t state_bytes = workload_save(from->workload, state, sizeof state);
    CHECK(state_bytes > 0);
    workload_read(from->workload, &left);
    memcpy(to->memory, from->memory, size_bytes);
    CHECK(workload_load(to->workload, state, (size_t)state_bytes) == 0);
    workload_read(to->workload, &arrived);
    CHECK(arrived.phase == WORKLOAD_PAUSED && arrived.steps == left.steps && arrived.writes == left.writes);
    CHECK(workload_resume(to->workload) == 0);
}

static void run_pattern(uint32_t pattern, uint64_t blocks, uint64_t rounds)
{
    uint64_t size_bytes = blocks * WORKLOAD_BLOCK_BYTES;
    struct host hosts[2];
    for (int i = 0; i < 2; i++) {
        hosts[i].memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(hosts[i].memory != MAP_FAILED);
        hosts[i].workload = workload_create(hosts[i].memory, size_bytes);
        CHECK(hosts[i].workload);
    }
    CHECK(workload_prepare(hosts[1].workload, THREADS) == 0);
    struct reader reader = {.hosts = hosts};
    CHECK(pthread_create(&reader.thread, NULL, run_reader, &reader) == 0);

    struct workload_config config = {
        .seed = pattern + 1, .threads = THREADS, .pattern = pattern, .write_per_mille = 500, .zero_per_mille = 200};
    CHECK(workload_start(hosts[0].workload, &config) == 0);
    CHECK(verified_or_failed(&hosts[0]).phase == WORKLOAD_RUNNING);
    uint64_t at = 0;
    for (uint64_t round = 0; round < rounds; round++, at ^= 1) {
        move(&hosts[at], &hosts[at ^ 1], size_bytes);
        struct workload_report report = verified_or_failed(&hosts[at ^ 1]);
        CHECK(report.phase == WORKLOAD_RUNNING && report.failure.kind == WORKLOAD_INTACT && report.first_step_ns > 0);
    }

    /* The check can fail: the last block of the memory holds what nobody wrote. */
    CHECK(workload_pause(hosts[at].workload, deadline_ns()) == 0);
    memset(hosts[at].memory + size_bytes - WORKLOAD_BLOCK_BYTES, 0xa5, WORKLOAD_BLOCK_BYTES);
    CHECK(workload_resume(hosts[at].workload) == 0);
    struct workload_report report = verified_or_failed(&hosts[at]);
    CHECK(report.phase == WORKLOAD_FAILED && report.failure.kind == WORKLOAD_PAGE_LOST);
    CHECK(report.failure.block_index == blocks - 1);

    atomic_store(&reader.stop, 1);
    pthread_join(reader.thread, NULL);
    for (int i = 0; i < 2; i++) {
        workload_destroy(hosts[i].workload);
        munmap(hosts[i].memory, size_bytes);
    }
}

int main(int argc, char **argv)
{
    static const char *const names[] = {"sequential", "random", "zipf", "chase", "permute"};
    uint64_t blocks = argc > 1 ? strtoull(argv[1], NULL, 10) : 4096;
    uint64_t rounds = argc > 2 ? strtoull(argv[2], NULL, 10) : 4;
    alarm(PROGRAM_DEADLINE_SECONDS);
    for (uint32_t pattern = WORKLOAD_SEQUENTIAL; pattern <= WORKLOAD_PERMUTE; pattern++) {
        run_pattern(pattern, blocks, rounds);
        printf("%s: held\n", names[pattern]);
    }
    return 0;
}
