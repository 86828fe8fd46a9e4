/* The KVM guest without Python: a machine under a plain C main, so that sanitizers see its monitor.
 *   kvm-main [MIB [ROUNDS]]
 * A guest of two vCPUs goes to and fro between two machines: pause, save, copy, load, resume, verify; all the while another thread
 * reads its report. Then a word of its memory is damaged, which it must find and name; then its memory is rolled back as a whole.
 * Exit 0: it verified itself each time, and found both. */
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine.h"
#include "program.h"
#include "../check.h"

#define VCPUS 2
#define DEADLINE_NS UINT64_C(20000000000)
#define PROGRAM_DEADLINE_SECONDS 110
#define ROLLED_BACK_ATTEMPTS 10

struct host {
    char *memory;
    uint64_t size_bytes;
    struct machine *machine;
};

static uint8_t state[MACHINE_STATE_BYTES_MAX];
static const struct machine_config config = {.seed = 7, .write_per_mille = 300, .zero_per_mille = 100, .beat_steps = 32};

static void host_open(struct host *host, uint64_t size_bytes)
{
    const char *step;
    *host = (struct host){.size_bytes = size_bytes};
    host->memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(host->memory != MAP_FAILED);
    struct machine_region region = {.address = (uint64_t)host->memory, .size_bytes = size_bytes};
    int result = machine_create(&host->machine, &region, 1, VCPUS, &step);
    if (result != 0)
        fprintf(stderr, "%s: %s\n", step, strerror(-result));
    CHECK(result == 0);
}

static void host_close(struct host *host)
{
    machine_destroy(host->machine);
    munmap(host->memory, host->size_bytes);
}

static struct machine_report report_of(const struct host *host)
{
    struct machine_report report;
    machine_read(host->machine, &report);
    return report;
}

static void await_event(const struct host *host)
{
    uint64_t count;
    struct pollfd poller = {.fd = machine_event_fd(host->machine), .events = POLLIN};
    CHECK(poll(&poller, 1, (int)(DEADLINE_NS / 1000000)) == 1);
    CHECK(read(poller.fd, &count, sizeof count) == sizeof count);
}

static void verify(const struct host *host)
{
    uint32_t before = report_of(host).verifications;
    machine_verify(host->machine);
    while (report_of(host).verifications == before) {
        CHECK(report_of(host).phase != MACHINE_FAILED);
        await_event(host);
    }
}

static void await_failure(const struct host *host)
{
    while (report_of(host).phase != MACHINE_FAILED)
        await_event(host);
}

static int64_t pause_and_save(const struct host *host)
{
    CHECK(machine_pause(host->machine, clock_monotonic_ns() + DEADLINE_NS) == 0);
    int64_t size_bytes = machine_save(host->machine, state, sizeof state);
    CHECK(size_bytes > 0);
    return size_bytes;
}

static void move(struct host *from, struct host *to)
{
    const char *why;
    uint64_t began_ns = clock_monotonic_ns();
    int64_t size_bytes = pause_and_save(from);
    uint64_t saved_ns = clock_monotonic_ns();
    CHECK(machine_load(to->machine, state, (size_t)size_bytes - 8, &why) == -EINVAL);
    memcpy(to->memory, from->memory, from->size_bytes);
    uint64_t copied_ns = clock_monotonic_ns();
    int result = machine_load(to->machine, state, (size_t)size_bytes, &why);
    if (result != 0)
        fprintf(stderr, "load: %s\n", why);
    CHECK(result == 0);
    uint64_t loaded_ns = clock_monotonic_ns();
    CHECK(machine_resume(to->machine) == 0);
    while (machine_first_step_ns(to->machine) == 0)
        await_event(to);
    if (getenv("KVM_MAIN_TIMES") != NULL)
        fprintf(stderr, "pause and save %.0f us, load %.0f us, first step %.0f us, state %lld bytes\n", (double)(saved_ns - began_ns) / 1e3,
                (double)(loaded_ns - copied_ns) / 1e3, (double)(machine_first_step_ns(to->machine) - loaded_ns) / 1e3,
                (long long)size_bytes);
}

/* A fresh machine for each way: what was moved away from is idle no more. */
static void commute(uint64_t size_bytes, int rounds)
{
    struct host here, there;
    host_open(&here, size_bytes);
    CHECK(machine_start(here.machine, &config) == 0);
    for (int round = 0; round < rounds; round++) {
        verify(&here);
        struct machine_report before = report_of(&here);
        host_open(&there, size_bytes);
        move(&here, &there);
        CHECK(report_of(&there).steps >= before.steps && report_of(&there).writes >= before.writes);
        host_close(&here);
        here = there;
    }
    verify(&here);
    CHECK(report_of(&here).first_touch.count > 0 && report_of(&here).touch.count > report_of(&here).first_touch.count);
    host_close(&here);
    puts("commute: held");
}

static void damaged(uint64_t size_bytes)
{
    struct host host;
    host_open(&host, size_bytes);
    CHECK(machine_start(host.machine, &config) == 0);
    verify(&host);
    pause_and_save(&host);
    uint64_t block = size_bytes / GUEST_BLOCK_BYTES - 3;
    uint64_t *word = (uint64_t *)(host.memory + block * GUEST_BLOCK_BYTES) + 17, intact = *word;
    *word ^= 1 << 5;
    CHECK(machine_resume(host.machine) == 0);
    await_failure(&host);
    struct machine_failure failure = report_of(&host).failure;
    CHECK(failure.kind == MACHINE_WRONG_WORD && failure.vcpu == VCPUS - 1 && failure.block_index == block);
    CHECK(failure.word_index == 17 && failure.expected == intact && failure.got == (intact ^ 1 << 5));
    CHECK(machine_pause(host.machine, clock_monotonic_ns() + DEADLINE_NS) == -EBADMSG);
    host_close(&host);
    puts("damaged: held");
}

/* A block that a vCPU has in hand as it is paused is a wrong word to it when that block was rolled back too: told as such, and rightly.
 * All else agrees with itself, and only the root tells. */
static void rolled_back(uint64_t size_bytes)
{
    char *old = malloc(size_bytes);
    CHECK(old != NULL);
    int attempts = 0;
    uint32_t found;
    do {
        CHECK(++attempts <= ROLLED_BACK_ATTEMPTS);
        struct host host;
        host_open(&host, size_bytes);
        CHECK(machine_start(host.machine, &config) == 0);
        verify(&host);
        pause_and_save(&host);
        memcpy(old, host.memory, size_bytes);
        CHECK(machine_resume(host.machine) == 0);
        verify(&host);
        pause_and_save(&host);
        memcpy(host.memory, old, size_bytes);
        CHECK(machine_resume(host.machine) == 0);
        await_failure(&host);
        found = report_of(&host).failure.kind;
        CHECK(found == MACHINE_ROLLED_BACK || found == MACHINE_WRONG_WORD);
        host_close(&host);
    } while (found != MACHINE_ROLLED_BACK);
    free(old);
    puts("rolled-back: held");
}

int main(int argc, char **argv)
{
    uint64_t size_bytes = (argc > 1 ? strtoull(argv[1], NULL, 10) : 8) << 20;
    int rounds = argc > 2 ? atoi(argv[2]) : 4;
    alarm(PROGRAM_DEADLINE_SECONDS);
    setvbuf(stdout, NULL, _IOLBF, 0);
    commute(size_bytes, rounds);
    damaged(size_bytes);
    rolled_back(size_bytes);
    return 0;
}
