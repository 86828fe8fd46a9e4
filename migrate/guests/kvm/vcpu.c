/* What one vCPU's thread does: KVM_RUN, the guest's ports, parking. See vcpu.h for the gate, program.S for the guest.
 *
 * A vCPU that is stalled in a page fault leaves KVM_RUN for a kick where the kernel's way to the page can be interrupted (KVM's own
 * mapping of a page, since Linux 6.2), and then takes the same instruction again when it runs on. Where it cannot (the walk through
 * the guest's page tables, an instruction that is emulated) it comes when its page has, and a pause waits that long: tests/guests/test_kvm_pause.py. */
#include "vcpu.h"

#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "futex.h"
#include "program.h"
#include "schedule.h"

#define ARREARS_MAX_NS UINT64_C(10000000) /* steps missed in longer stalls are not made up for */
#define WAIT_MAX_NS UINT64_C(10000000)    /* a wish to verify that just missed a sleeper's look is seen by then */
#define TICKS_MAX (UINT64_C(1) << 43)      /* most of an hour */
#define ERRNO_BASE 1000                   /* machine_failure.got: an errno, not an exit reason */

int vcpu_kick_signal(void)
{
    return SIGRTMIN + 4;
}

static void kicked(int signal_number)
{
    (void)signal_number; /* that it came is enough: KVM_RUN returns EINTR */
}

int vcpu_kick_install(void)
{
    struct sigaction action = {.sa_handler = kicked};
    sigemptyset(&action.sa_mask);
    return sigaction(vcpu_kick_signal(), &action, NULL) < 0 ? -errno : 0;
}

void vcpu_kick(struct vcpu *vcpu)
{
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    pthread_kill(vcpu->thread, vcpu_kick_signal());
}

static void signal_event(const struct machine *machine)
{
    uint64_t one = 1;
    if (write(machine->event_fd, &one, sizeof one) < 0)
        return; /* EAGAIN alone: it is readable already */
}

static void fail(struct vcpu *vcpu, struct machine_failure failure)
{
    struct machine *machine = vcpu->machine;
    if (atomic_flag_test_and_set(&machine->failure_claimed))
        return; /* another was first, and stops this one too */
    failure.vcpu = vcpu->index;
    machine->failure = failure;
    uint32_t gate = atomic_load(&machine->gate);
    do {
        if (gate_phase(gate) == GATE_QUIT)
            return;
    } while (!atomic_compare_exchange_weak(&machine->gate, &gate, gate_generation(gate) * GATE_PHASES + MACHINE_FAILED));
    futex_wake_all(&machine->gate); /* nobody is kicked: the others see it at their next heartbeat */
    atomic_fetch_add(&machine->arrivals, 1);
    futex_wake_all(&machine->arrivals);
    signal_event(machine);
}

static void stopped(struct vcpu *vcpu, uint64_t why)
{
    fail(vcpu, (struct machine_failure){.kind = MACHINE_STOPPED, .block_index = vcpu->run->s.regs.regs.rip, .got = why});
}

static void record(struct vcpu *vcpu, uint64_t block, uint64_t ticks)
{
    struct machine *machine = vcpu->machine;
    if (ticks > TICKS_MAX) /* a processor's clock that went back: another one's */
        ticks = 0;
    uint64_t elapsed_ns = ticks * 1000000 / machine->tsc_khz;
    histogram_record(&vcpu->touch, elapsed_ns);
    if (elapsed_ns < MACHINE_SLOW_NS || machine->epoch == 0 || block >= machine->blocks || machine->seen[block] == machine->epoch)
        return;
    machine->seen[block] = machine->epoch;
    histogram_record(&vcpu->first_touch, elapsed_ns);
}

static void add(_Atomic uint64_t *counter, uint64_t count)
{
    /* One writer: a load and a store do. */
    atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + count, memory_order_relaxed);
}

static void first_step(struct vcpu *vcpu, uint64_t now_ns)
{
    uint64_t none = 0;
    vcpu->stepped = true;
    if (atomic_compare_exchange_strong(&vcpu->machine->first_step_ns, &none, now_ns))
        signal_event(vcpu->machine);
}

/* Rest until the next step is due, unless all memory is to be verified. */
static void keep_rate(struct vcpu *vcpu, uint32_t running, uint64_t steps)
{
    struct machine *machine = vcpu->machine;
    if (machine->interval_ns == 0)
        return;
    uint64_t now_ns = clock_monotonic_ns(), due_ns = vcpu->due_ns + steps * machine->interval_ns;
    vcpu->due_ns = due_ns + ARREARS_MAX_NS < now_ns ? now_ns : due_ns;
    while (now_ns < vcpu->due_ns && atomic_load(&vcpu->passes_wanted) == 0 && atomic_load(&machine->gate) == running) {
        uint64_t latest_ns = now_ns + WAIT_MAX_NS;
        futex_wait(&machine->gate, running, vcpu->due_ns < latest_ns ? vcpu->due_ns : latest_ns);
        now_ns = clock_monotonic_ns();
    }
}

static void beat(struct vcpu *vcpu, uint32_t running)
{
    const struct kvm_regs *regs = &vcpu->run->s.regs.regs;
    uint64_t now_ns = clock_monotonic_ns(), steps = regs->rdi & UINT32_MAX, index = regs->r8;
    uint64_t quick = 2 * steps;
    add(&vcpu->steps, steps);
    add(&vcpu->writes, regs->rdi >> 32);
    atomic_store_explicit(&vcpu->last_step_ns, now_ns, memory_order_relaxed);
    if (!vcpu->stepped)
        first_step(vcpu, now_ns);
    if ((regs->r9 | regs->r10) != 0 && steps > 0) {
        quick -= 2;
        record(vcpu, vcpu->slice.table_first + index / GUEST_BLOCK_WORDS, regs->r9);
        record(vcpu, vcpu->slice.data_first + index, regs->r10);
    }
    for (uint64_t i = 0, mean = quick != 0 ? regs->r11 / quick : 0; i < quick && quick <= 1u << 16; i++)
        record(vcpu, UINT64_MAX, mean);
    keep_rate(vcpu, running, steps);
}

/* A pass is done: perhaps the last one that a verification waited for. */
static void pass(struct vcpu *vcpu)
{
    struct machine *machine = vcpu->machine;
    uint32_t passes = atomic_fetch_add(&vcpu->passes, 1) + 1, wanted = atomic_load(&vcpu->passes_wanted);
    if (wanted == 0 || (int32_t)(passes - wanted) < 0 || !atomic_compare_exchange_strong(&vcpu->passes_wanted, &wanted, 0))
        return;
    if (atomic_fetch_sub(&machine->verifying, 1) != 1)
        return; /* whoever is last says so */
    atomic_fetch_add(&machine->verifications, 1);
    signal_event(machine);
}

static void found_wrong(struct vcpu *vcpu)
{
    const struct kvm_regs *regs = &vcpu->run->s.regs.regs;
    bool word = (uint32_t)regs->rax == FAILURE_WORD;
    fail(vcpu, (struct machine_failure){
                   .kind = word ? MACHINE_WRONG_WORD : MACHINE_ROLLED_BACK,
                   .block_index = word ? vcpu->slice.data_first + regs->r8 : vcpu->slice.table_first,
                   .word_index = regs->rcx, .expected = regs->r9, .got = regs->r10});
}

static void serve_exit(struct vcpu *vcpu, uint32_t running)
{
    const struct kvm_run *run = vcpu->run;
    if (run->exit_reason == KVM_EXIT_INTR)
        return;
    if (run->exit_reason != KVM_EXIT_IO || run->io.direction != KVM_EXIT_IO_OUT)
        stopped(vcpu, run->exit_reason);
    else if (run->io.port == PORT_BEAT)
        beat(vcpu, running);
    else if (run->io.port == PORT_PASS)
        pass(vcpu);
    else if (run->io.port == PORT_FAILURE)
        found_wrong(vcpu);
    else
        stopped(vcpu, run->exit_reason);
}

/* Work until the gate is no longer `running`. */
static void run(struct vcpu *vcpu, uint32_t running)
{
    struct machine *machine = vcpu->machine;
    vcpu->due_ns = clock_monotonic_ns();
    vcpu->stepped = false;
    for (;;) {
        /* In this order: who kicks sets the gate first, then this. */
        __atomic_store_n(&vcpu->run->immediate_exit, 0, __ATOMIC_SEQ_CST);
        if (atomic_load(&machine->gate) != running)
            return;
        if (ioctl(vcpu->fd, KVM_RUN, 0) == 0)
            serve_exit(vcpu, running);
        else if (errno != EINTR && errno != EAGAIN)
            stopped(vcpu, ERRNO_BASE + (uint64_t)errno);
    }
}

static void acknowledge(struct vcpu *vcpu, uint32_t gate)
{
    struct machine *machine = vcpu->machine;
    if (gate_phase(gate) == GATE_PAUSING)
        vcpu->result = cpu_read(vcpu, &machine->state->vcpu[vcpu->index]);
    else if (gate_phase(gate) == GATE_FRESH)
        vcpu->result = cpu_read_fresh(vcpu);
    atomic_store_explicit(&vcpu->acknowledged, gate_generation(gate), memory_order_release);
    atomic_fetch_add(&machine->arrivals, 1);
    futex_wake_all(&machine->arrivals);
}

/* Wait at the gate; returns it once it says RUNNING or QUIT. */
static uint32_t park(struct vcpu *vcpu)
{
    struct machine *machine = vcpu->machine;
    for (;;) {
        uint32_t gate = atomic_load_explicit(&machine->gate, memory_order_acquire);
        if (gate_phase(gate) == MACHINE_RUNNING || gate_phase(gate) == GATE_QUIT)
            return gate;
        if (atomic_load_explicit(&vcpu->acknowledged, memory_order_relaxed) != gate_generation(gate))
            acknowledge(vcpu, gate);
        futex_wait(&machine->gate, gate, UINT64_MAX);
    }
}

void *vcpu_main(void *argument)
{
    struct vcpu *vcpu = argument;
    schedule_soon(); /* a pause waits for it, and then a guest that is moved */
    for (;;) {
        uint32_t gate = park(vcpu);
        if (gate_phase(gate) == GATE_QUIT)
            return NULL;
        run(vcpu, gate);
    }
}
