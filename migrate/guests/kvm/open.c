/* See machine.h. A machine is made, and ended: KVM's objects, memory, threads. Nothing here lies within a downtime. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "program.h"
#include "vcpu.h"

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
    *step = "KVM_SET_CPUID2";
    int result = cpu_set_cpuid(vcpu, &machine->cpuid);
    if (result != 0)
        return result;
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

static int fresh_await(struct machine *machine, const char **step)
{
    int result = machine_await_all(machine, GATE_PHASES + GATE_FRESH, clock_monotonic_ns() + FRESH_DEADLINE_NS);
    const struct vcpu *refused = result == 0 ? machine_first_refused(machine) : NULL;
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

void machine_destroy(struct machine *machine)
{
    if (machine == NULL)
        return;
    atomic_store(&machine->gate, gate_generation(atomic_load(&machine->gate)) * GATE_PHASES + GATE_QUIT);
    machine_kick_all(machine);
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
