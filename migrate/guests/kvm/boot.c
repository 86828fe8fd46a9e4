/* A guest that begins: the one time that the monitor itself writes guest memory.
 *
 * Physical memory begins at 4 GiB; virtual addresses are the physical ones. Its first blocks:
 *   0     page table of levels 4 and 3 in one, task state segment, program, parameters
 *   1..   page tables of level 2, one a GiB: pages of 2 MiB
 * Every page that a processor needs for its first step is a demand fault in the downtime, so these are few: of level 4 the guest has
 * entry 0, of level 3 those from 4 on, and all that lies behind them in the block is no entry of any address it has. Accessed and
 * dirty bits are set beforehand: no processor ever writes to the tables. */
#include <errno.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>

#include "program.h"
#include "vcpu.h"
#include "verify.h"

enum { BLOCK_SYSTEM, BLOCK_LEVEL_2 };

#define ENTRY_TABLE 0x67u /* present, writable, user, accessed, dirty */
#define ENTRY_2M 0xe7u    /* the same, a page of 2 MiB */
#define GIB (UINT64_C(1) << 30)

#define TSS_PORTS_OFFSET 104u /* behind the hardware's part: a bit a port, 0: user mode may use it */
#define TSS_BYTES (TSS_PORTS_OFFSET + 256 / 8 + 1)

/* In the system block: behind level 3's entries, of which there is one a GiB. */
#define TSS_OFFSET 640u
#define PROGRAM_OFFSET 800u
#define PARAMETERS_OFFSET 2400u
_Static_assert((GUEST_PHYSICAL_BASE + MACHINE_BYTES_MAX) / GIB * 8 <= TSS_OFFSET, "the entries do not reach the task state segment");
_Static_assert(TSS_OFFSET + TSS_BYTES <= PROGRAM_OFFSET, "nor that the program");
_Static_assert(PARAMETERS_OFFSET + MACHINE_VCPUS_MAX * PARAMETER_BYTES <= GUEST_BLOCK_BYTES, "one block holds all");

extern const char kvm_program[], kvm_program_end[];

static uint64_t boot_blocks(const struct machine *machine)
{
    return BLOCK_LEVEL_2 + (machine->memory_bytes + GIB - 1) / GIB;
}

bool boot_slice(const struct machine *machine, uint32_t vcpu, struct vcpu_slice *slice)
{
    uint64_t boot = boot_blocks(machine);
    if (machine->region[0].size_bytes < boot * GUEST_BLOCK_BYTES)
        return false;
    uint64_t all = machine->blocks - boot, first = boot + all * vcpu / machine->vcpus;
    uint64_t blocks = boot + all * (vcpu + 1) / machine->vcpus - first;
    if (blocks < 2)
        return false;
    uint64_t table_blocks = (blocks + GUEST_BLOCK_WORDS) / (GUEST_BLOCK_WORDS + 1);
    *slice = (struct vcpu_slice){.table_first = first, .data_first = first + table_blocks, .data_blocks = blocks - table_blocks};
    return true;
}

static uint64_t physical(uint64_t block)
{
    return GUEST_PHYSICAL_BASE + block * GUEST_BLOCK_BYTES;
}

static void *block_address(const struct machine *machine, uint64_t block)
{
    return (char *)machine->region[0].address + block * GUEST_BLOCK_BYTES;
}

static void write_tables(const struct machine *machine)
{
    uint64_t *level_4 = block_address(machine, BLOCK_SYSTEM), *level_3 = level_4;
    level_4[0] = physical(BLOCK_SYSTEM) | ENTRY_TABLE;
    for (uint64_t gib = 0; gib * GIB < machine->memory_bytes; gib++) {
        uint64_t *level_2 = block_address(machine, BLOCK_LEVEL_2 + gib);
        level_3[GUEST_PHYSICAL_BASE / GIB + gib] = physical(BLOCK_LEVEL_2 + gib) | ENTRY_TABLE;
        for (uint64_t i = 0; i < 512; i++)
            level_2[i] = (GUEST_PHYSICAL_BASE + gib * GIB + (i << 21)) | ENTRY_2M;
    }
}

static uint64_t below(uint32_t per_mille)
{
    return ((uint64_t)per_mille << 32) / 1000;
}

static void write_parameters(const struct machine *machine, const struct machine_config *config, uint32_t index)
{
    const struct vcpu_slice *slice = &machine->vcpu[index].slice;
    uint64_t *at = (uint64_t *)((char *)block_address(machine, BLOCK_SYSTEM) + PARAMETERS_OFFSET + index * PARAMETER_BYTES);
    uint32_t bits = slice->data_blocks > 1 ? 64 - (uint32_t)__builtin_clzll(slice->data_blocks - 1) : 0;
    uint64_t seed = mix64(config->seed) + index;
    at[PARAMETER_DATA / 8] = physical(slice->data_first);
    at[PARAMETER_TABLE / 8] = physical(slice->table_first);
    at[PARAMETER_BLOCKS / 8] = slice->data_blocks;
    at[PARAMETER_FIRST_BLOCK / 8] = slice->data_first;
    at[PARAMETER_MASK / 8] = (UINT64_C(1) << bits) - 1;
    at[PARAMETER_SHIFT / 8] = bits / 2 + 1;
    at[PARAMETER_KEY / 8] = mix64(config->seed);
    at[PARAMETER_ORDER / 8] = mix64(seed);
    at[PARAMETER_RANDOM / 8] = ~mix64(seed);
    at[PARAMETER_WRITE_BELOW / 8] = below(config->write_per_mille);
    at[PARAMETER_ZERO_BELOW / 8] = below(config->zero_per_mille);
    at[PARAMETER_BEAT_STEPS / 8] = config->beat_steps;
    at[PARAMETER_SLOW_TICKS / 8] = (uint64_t)MACHINE_SLOW_NS * machine->tsc_khz / 1000000;
}

static void write_memory(const struct machine *machine, const struct machine_config *config)
{
    char *system = block_address(machine, BLOCK_SYSTEM), *tss = system + TSS_OFFSET;
    write_tables(machine);
    memcpy(system + PROGRAM_OFFSET, kvm_program, (size_t)(kvm_program_end - kvm_program));
    uint16_t ports_offset = TSS_PORTS_OFFSET;
    memcpy(tss + 102, &ports_offset, sizeof ports_offset);
    tss[TSS_BYTES - 1] = (char)0xff; /* the bitmap's end, as the architecture wants it */
    for (uint32_t i = 0; i < machine->vcpus; i++)
        write_parameters(machine, config, i);
}

/* 64-bit user mode, paging on; no descriptor table, since no segment is ever loaded. */
static int set_registers(struct vcpu *vcpu)
{
    struct kvm_sregs sregs;
    if (ioctl(vcpu->fd, KVM_GET_SREGS, &sregs) < 0)
        return -errno;
    struct kvm_segment code = {.limit = 0xffffffff, .selector = 0x33, .type = 11, .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1};
    struct kvm_segment data = {.limit = 0xffffffff, .selector = 0x2b, .type = 3, .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1};
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.ss = sregs.fs = sregs.gs = data;
    sregs.tr = (struct kvm_segment){
        .base = physical(BLOCK_SYSTEM) + TSS_OFFSET, .limit = TSS_BYTES - 1, .selector = 0x40, .type = 11, .present = 1};
    sregs.ldt = (struct kvm_segment){.unusable = 1};
    sregs.gdt = sregs.idt = (struct kvm_dtable){0};
    sregs.cr0 = 0x80050033; /* PG AM WP NE ET MP PE */
    sregs.cr3 = physical(BLOCK_SYSTEM);
    sregs.cr4 = 0x620;  /* PAE OSFXSR OSXMMEXCPT */
    sregs.efer = 0xd01; /* NXE LMA LME SCE */
    struct kvm_regs regs = {.rip = physical(BLOCK_SYSTEM) + PROGRAM_OFFSET, .rflags = 0x3002, /* IOPL 3 */
                            .rdi = physical(BLOCK_SYSTEM) + PARAMETERS_OFFSET + vcpu->index * PARAMETER_BYTES};
    return ioctl(vcpu->fd, KVM_SET_SREGS, &sregs) < 0 || ioctl(vcpu->fd, KVM_SET_REGS, &regs) < 0 ? -errno : 0;
}

int boot(struct machine *machine, const struct machine_config *config)
{
    int result = kvm_program_end - kvm_program <= (ptrdiff_t)(PARAMETERS_OFFSET - PROGRAM_OFFSET) ? 0 : -ENOSPC;
    for (uint32_t i = 0; result == 0 && i < machine->vcpus; i++)
        result = set_registers(&machine->vcpu[i]);
    if (result == 0)
        write_memory(machine, config);
    return result;
}
