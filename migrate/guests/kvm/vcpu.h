/* A machine's vCPU threads and the gate they run behind. Internal to the machine.
 *
 * gate = generation * GATE_PHASES + phase, one futex word, as in the workload (worker.h there): a thread looks at it whenever KVM_RUN
 * returns, and any value but the one it was released with parks it. A kick makes KVM_RUN return: immediate_exit for a vCPU that is about
 * to enter it, a signal for one that is inside. Parked, a thread has read its vCPU's state, and stores the gate's generation as
 * acknowledged. */
#ifndef POSTCOPY_KVM_VCPU_H
#define POSTCOPY_KVM_VCPU_H

#include <linux/kvm.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "machine.h"
#include "state.h"

/* Beyond enum machine_phase, in the gate only. FRESH: each thread enters KVM once, without running, and reads what there is. It is a
 * vCPU's own thread that must be the first to: with another one the kernel waits for all its readers (kvm_vcpu_ioctl, pid). */
enum { GATE_PAUSING = 4, GATE_QUIT = 5, GATE_FRESH = 6, GATE_PHASES = 8 };

#define GUEST_PHYSICAL_BASE (UINT64_C(4) << 30) /* beyond all that KVM may want for itself below: local APICs, task state segment */

struct machine;

/* Its part of the memory, in blocks: | table | data |. */
struct vcpu_slice {
    uint64_t table_first, data_first, data_blocks;
};

struct vcpu {
    struct machine *machine;
    pthread_t thread;
    uint32_t index;
    int fd;
    struct kvm_run *run;
    struct vcpu_slice slice;

    /* Owned by the thread while it runs. */
    uint64_t due_ns; /* with a rate */
    bool stepped;    /* since the resume */
    bool spoiled;    /* a state was loaded, perhaps in part: nothing of it is as fresh */
    int result;      /* of reading or loading the state: 0 or a negative errno */
    const char *refused; /* which part of it */

    _Atomic uint32_t acknowledged;
    _Atomic uint32_t passes;
    _Atomic uint32_t passes_wanted; /* a verification is done then; 0: none */
    _Atomic uint64_t steps, writes, last_step_ns;
    struct histogram touch, first_touch;
};

struct machine {
    int kvm_fd, vm_fd, event_fd;
    uint64_t run_bytes; /* of a vCPU's struct kvm_run mapping */
    uint64_t memory_bytes, blocks;
    struct machine_region region[MACHINE_REGIONS_MAX];
    uint32_t region_count, vcpus, threads, tsc_khz, xsave_bytes;
    bool lapic;
    struct machine_config config;
    uint64_t interval_ns; /* between two steps of one vCPU; 0: flat out */
    uint32_t epoch;       /* of loads; 0: none */
    uint32_t *seen;       /* by block: the epoch of its last slow first touch */
    struct state_cpuid cpuid;
    struct machine_state *state;
    struct vcpu_state *fresh; /* of each vCPU before it runs */

    _Atomic uint32_t gate, arrivals, verifications, verifying /* vCPUs that still are */;
    _Atomic uint64_t first_step_ns;
    atomic_flag failure_claimed;
    struct machine_failure failure; /* final once the gate says FAILED */

    struct vcpu vcpu[MACHINE_VCPUS_MAX];
};

static inline uint32_t gate_phase(uint32_t gate)
{
    return gate % GATE_PHASES;
}

static inline uint32_t gate_generation(uint32_t gate)
{
    return gate / GATE_PHASES;
}

/* machine.c, for open.c too. await: until all have acknowledged this gate; -ETIMEDOUT, or -EBADMSG where a failing vCPU moves it. */
void machine_kick_all(struct machine *machine);
int machine_await_all(struct machine *machine, uint32_t gate, uint64_t deadline_ns);
const struct vcpu *machine_first_refused(const struct machine *machine); /* the first that could not be read, or NULL */

void *vcpu_main(void *argument); /* its struct vcpu */
void vcpu_kick(struct vcpu *vcpu);
int vcpu_kick_install(void); /* the signal's handler, which does nothing; 0 or a negative errno */
int vcpu_kick_signal(void);

/* cpu.c: what KVM is asked for and given. 0 or a negative errno. */
int cpu_supported(int kvm_fd, struct state_cpuid *cpuid);
int cpu_set_cpuid(struct vcpu *vcpu, const struct state_cpuid *cpuid);
int cpu_read(struct vcpu *vcpu, struct vcpu_state *state);
int cpu_read_fresh(struct vcpu *vcpu);
int cpu_load(struct vcpu *vcpu, const struct machine_state *state);
const char *cpu_unfit(const struct machine *machine, const struct machine_state *state); /* NULL, or why it cannot run here */

/* boot.c: a guest that begins. */
bool boot_slice(const struct machine *machine, uint32_t vcpu, struct vcpu_slice *slice);
int boot(struct machine *machine, const struct machine_config *config);

#endif
