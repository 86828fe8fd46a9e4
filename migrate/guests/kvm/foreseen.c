/* Where the paused guest stands: the pages that its first instructions need, as far as its registers tell.
 *
 * At the destination each would be a demand fault of its own, one behind the other, each as long as a round trip and, inside KVM, an
 * exit. What a processor needs to go on is known: the page tables of its instruction pointer, of its task state segment and of
 * whatever its general registers point to, and these pages themselves. A register that only looks like an address costs a page. */
#include "vcpu.h"

#define ENTRY_PRESENT UINT64_C(1)
#define ENTRY_LARGE (UINT64_C(1) << 7)
#define ENTRY_ADDRESS UINT64_C(0x000ffffffffff000)
#define BLOCK_SHIFT 12

struct found {
    const struct machine *machine;
    uint64_t *blocks;
    uint32_t count, capacity;
};

static bool note(struct found *found, uint64_t physical)
{
    uint64_t block = (physical - GUEST_PHYSICAL_BASE) >> BLOCK_SHIFT;
    if (physical < GUEST_PHYSICAL_BASE || block >= found->machine->blocks)
        return false;
    for (uint32_t i = 0; i < found->count; i++)
        if (found->blocks[i] == block)
            return true;
    if (found->count < found->capacity)
        found->blocks[found->count++] = block;
    return true;
}

/* Physical memory is the regions one after the other; the caller has noted the page, so it is in one of them. */
static uint64_t read_entry(const struct machine *machine, uint64_t physical)
{
    uint64_t offset = physical - GUEST_PHYSICAL_BASE;
    for (uint32_t i = 0; i < machine->region_count; i++) {
        if (offset < machine->region[i].size_bytes)
            return *(const uint64_t *)(machine->region[i].address + offset);
        offset -= machine->region[i].size_bytes;
    }
    return 0;
}

/* As the processor walks (long mode, four levels): its tables, then the page. An address that is mapped to nothing ends the walk. */
static void note_virtual(struct found *found, uint64_t level_4, uint64_t address)
{
    uint64_t table = level_4 & ENTRY_ADDRESS;
    for (uint32_t shift = 39;; shift -= 9) {
        if (!note(found, table))
            return;
        uint64_t entry = read_entry(found->machine, table + (address >> shift & 511) * 8);
        if (!(entry & ENTRY_PRESENT))
            return;
        uint64_t behind = (UINT64_C(1) << shift) - 1;
        table = entry & ENTRY_ADDRESS;
        if (shift == BLOCK_SHIFT || (shift < 39 && (entry & ENTRY_LARGE))) {
            note(found, (table & ~behind) | (address & behind));
            return;
        }
    }
}

uint32_t machine_foreseen(const struct machine *machine, uint64_t *blocks, uint32_t capacity)
{
    struct found found = {.machine = machine, .blocks = blocks, .capacity = capacity};
    if (gate_phase(atomic_load(&machine->gate)) != MACHINE_PAUSED)
        return 0;
    for (uint32_t i = 0; i < machine->vcpus; i++) {
        const struct vcpu_state *state = &machine->state->vcpu[i];
        const struct kvm_regs *regs = &state->regs;
        const uint64_t addresses[] = {regs->rip, state->sregs.tr.base, regs->rsp, regs->rax, regs->rbx, regs->rcx, regs->rdx,
                                      regs->rsi, regs->rdi, regs->rbp, regs->r8, regs->r9, regs->r10, regs->r11,
                                      regs->r12, regs->r13, regs->r14, regs->r15};
        for (size_t a = 0; a < sizeof(addresses) / sizeof(addresses[0]); a++)
            note_virtual(&found, state->sregs.cr3, addresses[a]);
    }
    return found.count;
}
