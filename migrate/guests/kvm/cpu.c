/* A vCPU's state out of KVM and into it. The order of loading is KVM's: what a later part depends on comes first (CPUID before the control
 * registers, those before the MSRs and the local APIC, whose base they hold).
 *
 * CPUID is the same on every host, as far as the program needs it: a 64-bit processor with SSE2. What it does not name it cannot use, so
 * the MSRs below are all there are. */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>

#include "vcpu.h"

static const uint32_t msr_indexes[] = {
    0x10,                                           /* TSC */
    0x174, 0x175, 0x176,                            /* SYSENTER: CS, ESP, EIP */
    0x1a0,                                          /* MISC_ENABLE */
    0x277,                                          /* PAT */
    0xc0000081, 0xc0000082, 0xc0000083, 0xc0000084, /* STAR, LSTAR, CSTAR, SYSCALL_MASK */
    0xc0000102,                                     /* KERNEL_GS_BASE; FS, GS and EFER come with the segments */
};
enum { MSRS = sizeof msr_indexes / sizeof *msr_indexes };
_Static_assert(MSRS <= STATE_MSRS_MAX, "they fit the state");

struct cpuid_all {
    struct kvm_cpuid2 head;
    struct kvm_cpuid_entry2 entry[256];
};

static const struct cpuid_leaf {
    uint32_t function, eax, ebx, ecx, edx; /* masks */
} cpuid_leaves[] = {
    {0x0, 0, ~0u, ~0u, ~0u},     /* vendor */
    {0x1, 0, 0, 0, 0x07018b79},  /* FPU PSE TSC MSR PAE CX8 APIC SEP PGE CMOV PAT FXSR SSE SSE2 and a little more */
    {0x80000000, 0, 0, 0, 0},
    {0x80000001, 0, 0, 0, 0x20100800}, /* SYSCALL NX LM */
    {0x80000008, 0xffff, 0, 0, 0},     /* widths of addresses */
};
enum { CPUID_LEAVES = sizeof cpuid_leaves / sizeof *cpuid_leaves };
#define CPUID_MAX_EAX(function) ((function) == 0 ? 1u : (function) == 0x80000000 ? 0x80000008 : 0u)
#define CPUID_FAMILY_EAX 0x000006f0 /* of every host: the family that 64 bits and SSE2 came with */

int cpu_supported(int kvm_fd, struct state_cpuid *cpuid)
{
    struct cpuid_all all = {.head = {.nent = 256}};
    if (ioctl(kvm_fd, KVM_GET_SUPPORTED_CPUID, &all) < 0)
        return -errno;
    memset(cpuid, 0, sizeof *cpuid);
    for (uint32_t i = 0; i < CPUID_LEAVES; i++) {
        const struct cpuid_leaf *leaf = &cpuid_leaves[i];
        for (uint32_t j = 0; j < all.head.nent; j++) {
            const struct kvm_cpuid_entry2 *entry = &all.entry[j];
            if (entry->function != leaf->function || entry->index != 0)
                continue;
            uint32_t eax = leaf->function == 1 ? CPUID_FAMILY_EAX : (entry->eax & leaf->eax) | CPUID_MAX_EAX(leaf->function);
            cpuid->entry[cpuid->count++] = (struct kvm_cpuid_entry2){
                .function = leaf->function, .eax = eax, .ebx = entry->ebx & leaf->ebx, .ecx = entry->ecx & leaf->ecx,
                .edx = entry->edx & leaf->edx,
            };
            break;
        }
    }
    return cpuid->count == CPUID_LEAVES ? 0 : -ENODEV;
}

static const struct kvm_cpuid_entry2 *leaf_of(const struct state_cpuid *cpuid, uint32_t function)
{
    for (uint32_t i = 0; i < cpuid->count; i++)
        if (cpuid->entry[i].function == function)
            return &cpuid->entry[i];
    return NULL;
}

const char *cpu_unfit(const struct machine *machine, const struct machine_state *state)
{
    if (state->cpuid.count != machine->cpuid.count)
        return "its processor is of another make-up";
    for (uint32_t i = 0; i < state->cpuid.count; i++) {
        const struct kvm_cpuid_entry2 *theirs = &state->cpuid.entry[i], *ours = leaf_of(&machine->cpuid, theirs->function);
        bool widths = theirs->function == 0x80000008;
        if (ours == NULL)
            return "its processor is of another make-up";
        if ((theirs->edx & ~ours->edx) != 0 && theirs->function != 0)
            return "its processor has what this one lacks";
        if (widths && ((theirs->eax & 0xff) > (ours->eax & 0xff) || (theirs->eax >> 8 & 0xff) > (ours->eax >> 8 & 0xff)))
            return "its processor has wider addresses than this one";
    }
    return NULL;
}

int cpu_set_cpuid(struct vcpu *vcpu, const struct state_cpuid *cpuid)
{
    struct cpuid_all all = {.head = {.nent = cpuid->count}};
    memcpy(all.entry, cpuid->entry, cpuid->count * sizeof *cpuid->entry);
    return ioctl(vcpu->fd, KVM_SET_CPUID2, &all) < 0 ? -errno : 0;
}

static int msrs_read(struct vcpu *vcpu, struct state_msrs *msrs)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[STATE_MSRS_MAX];
    } all = {.head = {.nmsrs = MSRS}};
    for (uint32_t i = 0; i < MSRS; i++)
        all.entry[i].index = msr_indexes[i];
    if (ioctl(vcpu->fd, KVM_GET_MSRS, &all) != MSRS)
        return -EIO;
    memset(msrs, 0, sizeof *msrs);
    msrs->count = MSRS;
    memcpy(msrs->entry, all.entry, sizeof all.entry);
    return 0;
}

static int msrs_load(struct vcpu *vcpu, const struct state_msrs *msrs)
{
    struct {
        struct kvm_msrs head;
        struct kvm_msr_entry entry[STATE_MSRS_MAX];
    } all = {.head = {.nmsrs = msrs->count}};
    memcpy(all.entry, msrs->entry, sizeof all.entry);
    int done = ioctl(vcpu->fd, KVM_SET_MSRS, &all);
    return done == (int)msrs->count ? 0 : done < 0 ? -errno : -EINVAL;
}

/* An operation that KVM_RUN left unfinished (the way back from a port) is finished by entering it once more, without running: then the
 * state is whole (Documentation/virt/kvm/api.rst, KVM_RUN), and the first three parts of it lie in kvm_run. */
static int settle(struct vcpu *vcpu, struct vcpu_state *state)
{
    struct kvm_run *run = vcpu->run;
    run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    __atomic_store_n(&run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    int done = ioctl(vcpu->fd, KVM_RUN, 0), error_number = errno;
    run->kvm_valid_regs = KVM_SYNC_X86_REGS;
    if (done == 0 || error_number != EINTR)
        return done == 0 ? -EIO : -error_number;
    state->regs = run->s.regs.regs;
    state->sregs = run->s.regs.sregs;
    state->events = run->s.regs.events;
    return 0;
}

static int get(struct vcpu *vcpu, const char *what, unsigned long request, void *into)
{
    vcpu->refused = what;
    return ioctl(vcpu->fd, request, into) < 0 ? -errno : 0;
}

int cpu_read(struct vcpu *vcpu, struct vcpu_state *state)
{
    int result = settle(vcpu, state);
    vcpu->refused = "KVM_RUN";
    state->counters = (struct state_counters){.steps = atomic_load(&vcpu->steps), .writes = atomic_load(&vcpu->writes)};
    state->xsave_bytes = vcpu->machine->xsave_bytes;
    if (result == 0)
        result = msrs_read(vcpu, &state->msrs);
    if (result == 0)
        result = get(vcpu, "XSAVE", state->xsave_bytes > sizeof(struct kvm_xsave) ? KVM_GET_XSAVE2 : KVM_GET_XSAVE, state->xsave);
    if (result == 0)
        result = get(vcpu, "XCRS", KVM_GET_XCRS, &state->xcrs);
    if (result == 0)
        result = get(vcpu, "MP_STATE", KVM_GET_MP_STATE, &state->mp_state);
    if (result == 0)
        result = get(vcpu, "DEBUGREGS", KVM_GET_DEBUGREGS, &state->debugregs);
    if (result == 0 && vcpu->machine->lapic)
        result = get(vcpu, "LAPIC", KVM_GET_LAPIC, &state->lapic);
    return result;
}

/* Of a vCPU that has never run: what a state has in common with it need not be loaded, within the downtime. */
int cpu_read_fresh(struct vcpu *vcpu)
{
    struct vcpu_state *fresh = &vcpu->machine->fresh[vcpu->index];
    struct kvm_mp_state runnable = {.mp_state = KVM_MP_STATE_RUNNABLE}; /* of each: whoever starts them all starts at once */
    vcpu->refused = "MP_STATE";
    return ioctl(vcpu->fd, KVM_SET_MP_STATE, &runnable) < 0 ? -errno : cpu_read(vcpu, fresh);
}

int cpu_load(struct vcpu *vcpu, const struct machine_state *all)
{
    const struct vcpu_state *state = &all->vcpu[vcpu->index], *fresh = &vcpu->machine->fresh[vcpu->index];
    bool lapic = vcpu->machine->lapic;
    const struct part {
        const char *name;
        unsigned long request;
        const void *content, *fresh;
        size_t size_bytes;
    } parts[] = {
        {"XCRS", KVM_SET_XCRS, &state->xcrs, &fresh->xcrs, sizeof state->xcrs},
        {"SREGS", KVM_SET_SREGS, &state->sregs, &fresh->sregs, sizeof state->sregs},
        {"MSRS", 0, NULL, NULL, 0},
        {"XSAVE", KVM_SET_XSAVE, state->xsave, fresh->xsave, state->xsave_bytes},
        {"LAPIC", KVM_SET_LAPIC, &state->lapic, &fresh->lapic, lapic ? sizeof state->lapic : 0},
        {"MP_STATE", KVM_SET_MP_STATE, &state->mp_state, &fresh->mp_state, sizeof state->mp_state},
        {"REGS", KVM_SET_REGS, &state->regs, &fresh->regs, sizeof state->regs},
        {"EVENTS", KVM_SET_VCPU_EVENTS, &state->events, &fresh->events, sizeof state->events},
        {"DEBUGREGS", KVM_SET_DEBUGREGS, &state->debugregs, &fresh->debugregs, sizeof state->debugregs},
    };
    vcpu->refused = "CPUID";
    int result = memcmp(&all->cpuid, &vcpu->machine->cpuid, sizeof all->cpuid) == 0 ? 0 : cpu_set_cpuid(vcpu, &all->cpuid);
    for (size_t i = 0; result == 0 && i < sizeof parts / sizeof *parts; i++) {
        const struct part *part = &parts[i];
        bool same = !vcpu->spoiled && part->content != NULL && memcmp(part->content, part->fresh, part->size_bytes) == 0;
        if (same)
            continue;
        vcpu->refused = part->name;
        if (part->content == NULL)
            result = msrs_load(vcpu, &state->msrs);
        else if (ioctl(vcpu->fd, part->request, part->content) < 0)
            result = -errno;
    }
    vcpu->spoiled = true;
    return result;
}
