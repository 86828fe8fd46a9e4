/* See machine.h. The controlling thread's side of the gate: start, pause, state, resume, report. What it stands on is made in open.c. */
#include "machine.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>

#include "futex.h"
#include "vcpu.h"

#define AWAIT_YIELD_NS 300000 /* vCPUs are out of KVM and read within that, if they have CPUs: those that we yield, rather than let them idle */

void machine_kick_all(struct machine *machine)
{
    futex_wake_all(&machine->gate);
    for (uint32_t i = 0; i < machine->threads; i++)
        vcpu_kick(&machine->vcpu[i]);
}

static bool all_parked(const struct machine *machine, uint32_t generation)
{
    for (uint32_t i = 0; i < machine->threads; i++)
        if (atomic_load_explicit(&machine->vcpu[i].acknowledged, memory_order_acquire) != generation)
            return false;
    return true;
}

int machine_await_all(struct machine *machine, uint32_t gate, uint64_t deadline_ns)
{
    uint64_t yield_end_ns = clock_monotonic_ns() + AWAIT_YIELD_NS;
    for (;;) {
        uint32_t arrivals = atomic_load(&machine->arrivals);
        if (atomic_load(&machine->gate) != gate)
            return -EBADMSG; /* nobody but a failing vCPU moves it now */
        if (all_parked(machine, gate_generation(gate)))
            return 0;
        uint64_t now_ns = clock_monotonic_ns();
        if (now_ns >= deadline_ns)
            return -ETIMEDOUT;
        if (now_ns < yield_end_ns)
            sched_yield();
        else
            futex_wait(&machine->arrivals, arrivals, deadline_ns);
    }
}

static uint32_t next_generation(uint32_t gate)
{
    return (gate_generation(gate) + 1) % (UINT32_MAX / GATE_PHASES);
}

/* The first vCPU that could not be read or loaded, or NULL. */
const struct vcpu *machine_first_refused(const struct machine *machine)
{
    for (uint32_t i = 0; i < machine->vcpus; i++)
        if (machine->vcpu[i].result != 0)
            return &machine->vcpu[i];
    return NULL;
}

static bool config_valid(const struct machine_config *config)
{
    return config->write_per_mille <= 1000 && config->zero_per_mille <= 1000 && config->beat_steps >= 1 &&
           config->beat_steps <= 1u << 15 && config->reserved == 0;
}

static void configure(struct machine *machine, const struct machine_config *config)
{
    machine->config = *config;
    machine->interval_ns = config->rate_per_second == 0 ? 0 : machine->vcpus * UINT64_C(1000000000) / config->rate_per_second;
    atomic_store(&machine->verifications, 0);
    atomic_store(&machine->first_step_ns, 0);
}

static void release(struct machine *machine, uint32_t generation)
{
    atomic_store(&machine->first_step_ns, 0);
    atomic_store(&machine->gate, generation * GATE_PHASES + MACHINE_RUNNING);
    futex_wake_all(&machine->gate);
}

int machine_start(struct machine *machine, const struct machine_config *config)
{
    uint32_t gate = atomic_load(&machine->gate);
    if (gate_phase(gate) != MACHINE_IDLE)
        return -EBUSY;
    if (!config_valid(config))
        return -EINVAL;
    int result = boot(machine, config);
    if (result != 0)
        return result;
    configure(machine, config);
    release(machine, gate_generation(gate));
    return 0;
}

int machine_pause(struct machine *machine, uint64_t deadline_ns)
{
    uint32_t gate = atomic_load(&machine->gate);
    if (gate_phase(gate) == MACHINE_PAUSED)
        return 0;
    if (gate_phase(gate) == MACHINE_FAILED)
        return -EBADMSG;
    if (gate_phase(gate) != MACHINE_RUNNING)
        return -EINVAL;
    uint32_t generation = next_generation(gate), pausing = generation * GATE_PHASES + GATE_PAUSING;
    if (!atomic_compare_exchange_strong(&machine->gate, &gate, pausing))
        return -EBADMSG;
    machine_kick_all(machine);
    int result = machine_await_all(machine, pausing, deadline_ns);
    if (result == 0 && machine_first_refused(machine) != NULL)
        result = -EIO;
    uint32_t next = generation * GATE_PHASES + (result == 0 ? MACHINE_PAUSED : MACHINE_RUNNING);
    if (result != -EBADMSG && !atomic_compare_exchange_strong(&machine->gate, &pausing, next))
        return -EBADMSG;
    futex_wake_all(&machine->gate);
    return result;
}

int64_t machine_save(const struct machine *machine, uint8_t *bytes, size_t capacity_bytes)
{
    uint32_t phase = gate_phase(atomic_load(&machine->gate));
    if (phase != MACHINE_PAUSED)
        return phase == MACHINE_FAILED ? -EBADMSG : -EINVAL;
    struct machine_state *state = machine->state;
    state->machine = (struct state_machine){.config = machine->config, .tsc_khz = machine->tsc_khz, .lapic = machine->lapic};
    state->cpuid = machine->cpuid;
    state->vcpus = machine->vcpus;
    state->memory_bytes = machine->memory_bytes;
    return state_write(state, bytes, capacity_bytes);
}

static const char *state_unfit(struct machine *machine, const uint8_t *bytes, size_t size_bytes)
{
    struct machine_state *state = machine->state;
    state->vcpus = machine->vcpus;
    state->memory_bytes = machine->memory_bytes;
    state->machine.lapic = machine->lapic;
    for (uint32_t i = 0; i < machine->vcpus; i++)
        state->vcpu[i].xsave_bytes = machine->xsave_bytes;
    const char *wrong = state_read(state, bytes, size_bytes);
    if (wrong == NULL && !config_valid(&state->machine.config))
        wrong = "its settings are out of range";
    if (wrong == NULL)
        wrong = cpu_unfit(machine, state);
    return wrong;
}

static int tsc_take(struct machine *machine, uint32_t tsc_khz)
{
    if (tsc_khz == machine->tsc_khz)
        return 0;
    for (uint32_t i = 0; i < machine->vcpus; i++)
        if (ioctl(machine->vcpu[i].fd, KVM_SET_TSC_KHZ, tsc_khz) < 0)
            return -EINVAL;
    machine->tsc_khz = tsc_khz;
    return 0;
}

/* What a machine knows of its guest besides KVM. */
static void take_over(struct machine *machine)
{
    const struct machine_state *state = machine->state;
    machine->cpuid = state->cpuid;
    machine->epoch++;
    configure(machine, &state->machine.config);
    for (uint32_t i = 0; i < machine->vcpus; i++) {
        struct vcpu *vcpu = &machine->vcpu[i];
        atomic_store(&vcpu->steps, state->vcpu[i].counters.steps);
        atomic_store(&vcpu->writes, state->vcpu[i].counters.writes);
        atomic_store(&vcpu->last_step_ns, 0);
        atomic_store(&vcpu->passes, 0);
        atomic_store(&vcpu->passes_wanted, 0);
        histogram_clear(&vcpu->touch);
        histogram_clear(&vcpu->first_touch);
    }
}

int machine_load(struct machine *machine, const uint8_t *bytes, size_t size_bytes, const char **why)
{
    uint32_t gate = atomic_load(&machine->gate);
    *why = "";
    if (gate_phase(gate) != MACHINE_IDLE)
        return -EBUSY;
    *why = state_unfit(machine, bytes, size_bytes);
    if (*why != NULL)
        return -EINVAL;
    *why = "KVM_SET_TSC_KHZ";
    if (tsc_take(machine, machine->state->machine.tsc_khz) != 0)
        return -EINVAL;
    for (uint32_t i = 0; i < machine->vcpus; i++)
        if (cpu_load(&machine->vcpu[i], machine->state) != 0) {
            *why = machine->vcpu[i].refused;
            return -EINVAL;
        }
    take_over(machine);
    atomic_store(&machine->gate, gate_generation(gate) * GATE_PHASES + MACHINE_PAUSED);
    return 0;
}

int machine_resume(struct machine *machine)
{
    uint32_t gate = atomic_load(&machine->gate);
    if (gate_phase(gate) != MACHINE_PAUSED)
        return gate_phase(gate) == MACHINE_FAILED ? -EBADMSG : -EINVAL;
    release(machine, gate_generation(gate));
    return 0;
}

void machine_verify(struct machine *machine)
{
    atomic_store(&machine->verifying, machine->vcpus);
    /* The pass under way has begun before, so it does not count. */
    for (uint32_t i = 0; i < machine->vcpus; i++)
        atomic_store(&machine->vcpu[i].passes_wanted, atomic_load(&machine->vcpu[i].passes) + 2);
    futex_wake_all(&machine->gate); /* those that wait for their rate */
}

int machine_event_fd(const struct machine *machine)
{
    return machine->event_fd;
}

uint64_t machine_last_step_ns(const struct machine *machine)
{
    uint64_t last_step_ns = 0;
    for (uint32_t i = 0; i < machine->vcpus; i++) {
        uint64_t step_ns = atomic_load(&machine->vcpu[i].last_step_ns);
        last_step_ns = step_ns > last_step_ns ? step_ns : last_step_ns;
    }
    return last_step_ns;
}

uint64_t machine_first_step_ns(const struct machine *machine)
{
    return atomic_load(&machine->first_step_ns);
}

void machine_read(const struct machine *machine, struct machine_report *report)
{
    uint32_t phase = gate_phase(atomic_load(&machine->gate));
    memset(report, 0, sizeof *report);
    report->phase = phase == GATE_PAUSING ? MACHINE_RUNNING : phase == GATE_QUIT || phase == GATE_FRESH ? MACHINE_IDLE : phase;
    report->first_step_ns = machine_first_step_ns(machine);
    report->last_step_ns = machine_last_step_ns(machine);
    report->verifications = atomic_load(&machine->verifications);
    for (uint32_t i = 0; i < machine->vcpus; i++) {
        const struct vcpu *vcpu = &machine->vcpu[i];
        struct histogram_copy copy;
        report->steps += atomic_load(&vcpu->steps);
        report->writes += atomic_load(&vcpu->writes);
        histogram_read(&vcpu->touch, &copy);
        histogram_add(&report->touch, &copy);
        histogram_read(&vcpu->first_touch, &copy);
        histogram_add(&report->first_touch, &copy);
    }
    if (phase == MACHINE_FAILED)
        report->failure = machine->failure;
}
