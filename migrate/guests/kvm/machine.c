/* See machine.h. The controlling thread's side: KVM's objects, threads, the gate. */
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "futex.h"
#include "program.h"
#include "vcpu.h"

#define AWAIT_YIELD_NS 300000 /* vCPUs are out of KVM and read within that, if they have CPUs: those that we yield, rather than let them idle */
#define FRESH_DEADLINE_NS UINT64_C(5000000000)
#define TSS_ADDRESS 0xfffbd000 /* VMX wants three pages of its own below 4 GiB */

static int vcpu_open(struct machine *machine, uint32_t index, const char **step)
{
    struct vcpu *vcpu = &machine->vcpu[index];
    vcpu->machine = machine;
    vcpu->index = index;
    *step = "KVM_CREATE_VCPU";
    vcpu->fd = ioctl(machine->vm_fd, KVM_CREATE_VCPU, index);
    if (vcpu->fd < 0)
        return -errno;
    void *run = mmap(NULL, machine->run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu->fd, 0);
    if (run == MAP_FAILED)
        return -errno;
    vcpu->run = run;
    vcpu->run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    struct {
        struct kvm_cpuid2 head;
        struct kvm_cpuid_entry2 entry[STATE_CPUID_ENTRIES_MAX];
    } cpuid = {.head = {.nent = machine->cpuid.count}};
    memcpy(cpuid.entry, machine->cpuid.entry, sizeof cpuid.entry);
    *step = "KVM_SET_CPUID2";
    if (ioctl(vcpu->fd, KVM_SET_CPUID2, &cpuid) < 0)
        return -errno;
    *step = "KVM_GET_TSC_KHZ";
    int tsc_khz = ioctl(vcpu->fd, KVM_GET_TSC_KHZ, 0);
    machine->tsc_khz = tsc_khz > 0 ? (uint32_t)tsc_khz : 0;
    return tsc_khz > 0 ? 0 : -ENODEV;
}

/* What the monitor cannot do without (all of it in Linux 4.17 and later). */
static int capabilities(struct machine *machine, const char **step)
{
    static const struct {
        int number, least;
        const char *name;
    } needed[] = {
        {KVM_CAP_USER_MEMORY, 1, "KVM_CAP_USER_MEMORY"},       {KVM_CAP_SYNC_MMU, 1, "KVM_CAP_SYNC_MMU"},
        {KVM_CAP_IMMEDIATE_EXIT, 1, "KVM_CAP_IMMEDIATE_EXIT"}, {KVM_CAP_SYNC_REGS, 7, "KVM_CAP_SYNC_REGS"},
        {KVM_CAP_XSAVE, 1, "KVM_CAP_XSAVE"},                   {KVM_CAP_XCRS, 1, "KVM_CAP_XCRS"},
        {KVM_CAP_DEBUGREGS, 1, "KVM_CAP_DEBUGREGS"},           {KVM_CAP_MP_STATE, 1, "KVM_CAP_MP_STATE"},
        {KVM_CAP_GET_TSC_KHZ, 1, "KVM_CAP_GET_TSC_KHZ"},
    };
    for (size_t i = 0; i < sizeof needed / sizeof *needed; i++)
        if (*step = needed[i].name, ioctl(machine->vm_fd, KVM_CHECK_EXTENSION, needed[i].number) < needed[i].least)
            return -EOPNOTSUPP;
    int xsave_bytes = ioctl(machine->vm_fd, KVM_CHECK_EXTENSION, KVM_CAP_XSAVE2);
    machine->xsave_bytes = xsave_bytes > (int)sizeof(struct kvm_xsave) ? (uint32_t)xsave_bytes : sizeof(struct kvm_xsave);
    *step = "KVM_CAP_XSAVE2";
    return machine->xsave_bytes <= STATE_XSAVE_BYTES_MAX ? 0 : -EOPNOTSUPP;
}

static int vm_open(struct machine *machine, const char **step)
{
    *step = "/dev/kvm";
    machine->kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (machine->kvm_fd < 0)
        return -errno;
    *step = "KVM_GET_API_VERSION";
    if (ioctl(machine->kvm_fd, KVM_GET_API_VERSION, 0) != KVM_API_VERSION)
        return -EOPNOTSUPP;
    *step = "KVM_CREATE_VM";
    machine->vm_fd = ioctl(machine->kvm_fd, KVM_CREATE_VM, 0);
    int run_bytes = ioctl(machine->kvm_fd, KVM_GET_VCPU_MMAP_SIZE, 0);
    if (machine->vm_fd < 0 || run_bytes < 0)
        return -errno;
    machine->run_bytes = (uint64_t)run_bytes;
    int result = capabilities(machine, step);
    if (result != 0)
        return result;
    ioctl(machine->vm_fd, KVM_SET_TSS_ADDR, TSS_ADDRESS); /* where there is none, none is wanted */
    struct kvm_enable_cap split = {.cap = KVM_CAP_SPLIT_IRQCHIP, .args = {24}};
    machine->lapic = ioctl(machine->vm_fd, KVM_ENABLE_CAP, &split) == 0;
    *step = "KVM_GET_SUPPORTED_CPUID";
    return cpu_supported(machine->kvm_fd, &machine->cpuid);
}

static int memory_place(struct machine *machine, const char **step)
{
    uint64_t physical = GUEST_PHYSICAL_BASE;
    *step = "KVM_SET_USER_MEMORY_REGION";
    for (uint32_t i = 0; i < machine->region_count; i++) {
        struct kvm_userspace_memory_region region = {
            .slot = i, .guest_phys_addr = physical, .memory_size = machine->region[i].size_bytes,
            .userspace_addr = machine->region[i].address};
        if (ioctl(machine->vm_fd, KVM_SET_USER_MEMORY_REGION, &region) < 0)
            return -errno;
        physical += machine->region[i].size_bytes;
    }
    *step = "a slice of the memory for each vCPU";
    for (uint32_t i = 0; i < machine->vcpus; i++)
        if (!boot_slice(machine, i, &machine->vcpu[i].slice))
            return -EINVAL;
    return 0;
}

static int threads_start(struct machine *machine, const char **step)
{
    /* Signals belong to the threads of whoever embeds us; but for the kick, and those that a touch of memory raises. */
    sigset_t blocked, before;
    sigfillset(&blocked);
    sigdelset(&blocked, SIGBUS);
    sigdelset(&blocked, SIGSEGV);
    sigdelset(&blocked, vcpu_kick_signal());
    int result = vcpu_kick_install();
    *step = "a thread";
    atomic_store(&machine->gate, GATE_PHASES + GATE_FRESH);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    while (result == 0 && machine->threads < machine->vcpus) {
        struct vcpu *vcpu = &machine->vcpu[machine->threads];
        char name[16];
        result = -pthread_create(&vcpu->thread, NULL, vcpu_main, vcpu);
        if (result != 0)
            break;
        snprintf(name, sizeof name, "vcpu-%u", machine->threads % MACHINE_VCPUS_MAX); /* the bound tells the compiler that it fits */
        pthread_setname_np(vcpu->thread, name);
        machine->threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return result;
}

static bool all_parked(const struct machine *machine, uint32_t generation)
{
    for (uint32_t i = 0; i < machine->threads; i++)
        if (atomic_load_explicit(&machine->vcpu[i].acknowledged, memory_order_acquire) != generation)
            return false;
    return true;
}

static int await_all(struct machine *machine, uint32_t gate, uint64_t deadline_ns)
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
static const struct vcpu *first_refused(const struct machine *machine)
{
    for (uint32_t i = 0; i < machine->vcpus; i++)
        if (machine->vcpu[i].result != 0)
            return &machine->vcpu[i];
    return NULL;
}

static int fresh_await(struct machine *machine, const char **step)
{
    int result = await_all(machine, GATE_PHASES + GATE_FRESH, clock_monotonic_ns() + FRESH_DEADLINE_NS);
    const struct vcpu *refused = result == 0 ? first_refused(machine) : NULL;
    if (refused != NULL) {
        *step = refused->refused;
        result = refused->result;
    }
    atomic_store(&machine->gate, GATE_PHASES + MACHINE_IDLE);
    return result;
}

static int open_all(struct machine *machine, const char **step)
{
    *step = "memory";
    machine->seen = calloc(machine->blocks, sizeof *machine->seen);
    machine->state = calloc(1, sizeof *machine->state);
    machine->fresh = calloc(machine->vcpus, sizeof *machine->fresh);
    machine->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (machine->seen == NULL || machine->state == NULL || machine->fresh == NULL || machine->event_fd < 0)
        return machine->event_fd < 0 ? -errno : -ENOMEM;
    memset(machine->seen, 0, machine->blocks * sizeof *machine->seen); /* populated here, not amid a measured fault */
    int result = vm_open(machine, step);
    for (uint32_t i = 0; result == 0 && i < machine->vcpus; i++)
        result = vcpu_open(machine, i, step);
    if (result == 0)
        result = memory_place(machine, step);
    if (result == 0)
        result = threads_start(machine, step);
    return result == 0 ? fresh_await(machine, step) : result;
}

int machine_create(struct machine **made, const struct machine_region *regions, uint32_t region_count, uint32_t vcpus,
                   const char **step)
{
    *step = "the machine";
    *made = NULL;
    if (region_count < 1 || region_count > MACHINE_REGIONS_MAX || vcpus < 1 || vcpus > MACHINE_VCPUS_MAX)
        return -EINVAL;
    struct machine *machine = calloc(1, sizeof *machine);
    if (machine == NULL)
        return -ENOMEM;
    machine->kvm_fd = machine->vm_fd = machine->event_fd = -1;
    machine->vcpus = vcpus;
    machine->region_count = region_count;
    for (uint32_t i = 0; i < vcpus; i++)
        machine->vcpu[i].fd = -1;
    for (uint32_t i = 0; i < region_count; i++) {
        machine->region[i] = regions[i];
        machine->memory_bytes += regions[i].size_bytes;
    }
    machine->blocks = machine->memory_bytes / GUEST_BLOCK_BYTES;
    atomic_flag_clear(&machine->failure_claimed);
    int result = machine->memory_bytes > MACHINE_BYTES_MAX ? -EINVAL : open_all(machine, step);
    if (result == 0)
        *made = machine;
    else
        machine_destroy(machine);
    return result;
}

static void kick_all(struct machine *machine)
{
    futex_wake_all(&machine->gate);
    for (uint32_t i = 0; i < machine->threads; i++)
        vcpu_kick(&machine->vcpu[i]);
}

void machine_destroy(struct machine *machine)
{
    if (machine == NULL)
        return;
    atomic_store(&machine->gate, gate_generation(atomic_load(&machine->gate)) * GATE_PHASES + GATE_QUIT);
    kick_all(machine);
    for (uint32_t i = 0; i < machine->threads; i++)
        pthread_join(machine->vcpu[i].thread, NULL);
    for (uint32_t i = 0; i < machine->vcpus; i++) {
        if (machine->vcpu[i].run != NULL)
            munmap(machine->vcpu[i].run, machine->run_bytes);
        if (machine->vcpu[i].fd >= 0)
            close(machine->vcpu[i].fd);
    }
    int descriptors[] = {machine->vm_fd, machine->kvm_fd, machine->event_fd};
    for (size_t i = 0; i < sizeof descriptors / sizeof *descriptors; i++)
        if (descriptors[i] >= 0)
            close(descriptors[i]);
    free(machine->seen);
    free(machine->state);
    free(machine->fresh);
    free(machine);
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
    kick_all(machine);
    int result = await_all(machine, pausing, deadline_ns);
    if (result == 0 && first_refused(machine) != NULL)
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

static void histogram_clear(struct histogram *histogram)
{
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++)
        atomic_store_explicit(&histogram->bucket[i], 0, memory_order_relaxed);
    atomic_store_explicit(&histogram->count, 0, memory_order_relaxed);
    atomic_store_explicit(&histogram->sum_ns, 0, memory_order_relaxed);
    atomic_store_explicit(&histogram->max_ns, 0, memory_order_relaxed);
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
