/* A small machine on /dev/kvm: N vCPUs in long mode, guest memory that lies in this process, a program of the project's own at work on
 * it (program.S). The monitor is C alone: one thread a vCPU, started when the machine is made, parked until it starts or is loaded.
 *
 * Paused, its state is all that KVM needs to run on somewhere else (state.h). The monitor writes the guest's memory once, in
 * machine_start, and reads of it no more than page tables, in machine_foreseen. KVM touches it inside the kernel: its userfaultfd must take kernel-mode faults. */
#ifndef POSTCOPY_KVM_MACHINE_H
#define POSTCOPY_KVM_MACHINE_H

#include <stddef.h>
#include <stdint.h>

#include "histogram.h"

#define MACHINE_VCPUS_MAX 16
#define MACHINE_REGIONS_MAX 64
#define MACHINE_BYTES_MAX (UINT64_C(64) << 30)
#define MACHINE_STATE_BYTES_MAX 262144

struct machine_region {
    uint64_t address; /* where it is mapped in this process */
    uint64_t size_bytes;
};

struct machine_config {
    uint64_t seed;
    uint64_t rate_per_second; /* steps of all vCPUs together, about; 0: flat out */
    uint32_t write_per_mille; /* share of steps that also write */
    uint32_t zero_per_mille;  /* share of blocks never written at the start */
    uint32_t beat_steps;      /* a heartbeat at least that often; an exit costs as much as many steps */
    uint32_t reserved;        /* 0 */
};

enum machine_phase { MACHINE_IDLE = 0, MACHINE_RUNNING = 1, MACHINE_PAUSED = 2, MACHINE_FAILED = 3 };

enum machine_failure_kind {
    MACHINE_INTACT = 0,
    MACHINE_WRONG_WORD = 1,  /* a word of a block that no intact memory has there */
    MACHINE_ROLLED_BACK = 2, /* blocks and table agree with each other and not with the root */
    MACHINE_STOPPED = 3,     /* KVM could not run on: expected 0, got: its exit reason, or errno + 1000; block_index: rip */
};

struct machine_failure {
    uint32_t kind;       /* enum machine_failure_kind */
    uint32_t vcpu;
    uint64_t block_index; /* guest-wide */
    uint64_t word_index;
    uint64_t expected; /* the word, or the root */
    uint64_t got;
};

struct machine_report {
    uint32_t phase;
    uint32_t verifications; /* whole passes over all memory that began after machine_verify */
    uint64_t steps;         /* since the guest's start, on whichever host */
    uint64_t writes;        /* likewise */
    uint64_t last_step_ns;  /* CLOCK_MONOTONIC of the last heartbeat before the pause: no step is known to have ended later */
    uint64_t first_step_ns; /* of the first heartbeat since the last resume; 0: none yet */
    struct machine_failure failure;
    struct histogram_copy touch;       /* every touch that took MACHINE_SLOW_NS; the others by the mean of their heartbeat */
    struct histogram_copy first_touch; /* since the last load: the first slow touch of each block */
};

#define MACHINE_SLOW_NS 2000

struct machine;

/* machine_read, machine_verify and machine_event_fd may be called by any thread; the others by one at a time. What returns int answers
 * 0 or a negative errno: -EBADMSG once the guest has found itself wrong (report.failure), -EINVAL and -EBUSY out of turn. */

/* Regions lie one after the other in the guest's physical memory; none is touched. *step names what failed ("/dev/kvm", …). */
int machine_create(struct machine **machine, const struct machine_region *regions, uint32_t region_count, uint32_t vcpus,
                   const char **step);
void machine_destroy(struct machine *machine); /* waits for a vCPU that is in a fault which nothing interrupts */

/* Idle only; memory must read zero. Writes program, page tables and parameters into the guest's memory, and lets it run. */
int machine_start(struct machine *machine, const struct machine_config *config);
/* Every vCPU out of KVM_RUN and its state read. -ETIMEDOUT: one stays in a fault of the kernel beyond deadline_ns (CLOCK_MONOTONIC): all
 * run on then. Paused already: 0. */
int machine_pause(struct machine *machine, uint64_t deadline_ns);
/* Paused only; bytes written or a negative errno. */
int64_t machine_save(const struct machine *machine, uint8_t *state, size_t capacity_bytes);
/* Paused only: guest-wide blocks on which its vCPUs stand, which it touches first when it runs on. How many, at most `capacity`. */
uint32_t machine_foreseen(const struct machine *machine, uint64_t *blocks, uint32_t capacity);
/* Idle only: take a state over; paused then. Checked as a whole before KVM sees any of it; *why says what it is refused for, -EINVAL. A
 * machine in which KVM itself refused a part (-EINVAL too) stays idle, and may be given another. */
int machine_load(struct machine *machine, const uint8_t *state, size_t size_bytes, const char **why);
int machine_resume(struct machine *machine);
/* Count one more in report.verifications once every vCPU has begun and ended a pass over its whole slice. One at a time;
 * forgotten by load. */
void machine_verify(struct machine *machine);
/* Readable after a first step since resume, a verification, a failure. */
int machine_event_fd(const struct machine *machine);
uint64_t machine_last_step_ns(const struct machine *machine);
uint64_t machine_first_step_ns(const struct machine *machine);
void machine_read(const struct machine *machine, struct machine_report *report);

#endif
