/* A paused machine in bytes, and what it is checked for before KVM sees any of it. Internal to the machine.
 *
 *   header   magic, checksum, version, vCPUs, memory in bytes, size in bytes
 *   sections {kind u16, vcpu u16, length u32} and that many bytes, padded to 8; each kind once (once a vCPU), in any order
 *
 * Pure: no system call, no KVM; tests/guests/kvm_state_main.c feeds it bytes. */
#ifndef POSTCOPY_KVM_STATE_H
#define POSTCOPY_KVM_STATE_H

#include <linux/kvm.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "machine.h"

#define STATE_XSAVE_BYTES_MAX 16384
#define STATE_CPUID_ENTRIES_MAX 16
#define STATE_MSRS_MAX 32

/* What of a vCPU is not in KVM. */
struct state_counters {
    uint64_t steps, writes;
};

/* The whole machine's, not in KVM either. */
struct state_machine {
    struct machine_config config;
    uint32_t tsc_khz;
    uint32_t lapic; /* 1: local APICs are in the kernel */
};

struct state_cpuid {
    uint32_t count, reserved;
    struct kvm_cpuid_entry2 entry[STATE_CPUID_ENTRIES_MAX];
};

struct state_msrs {
    uint32_t count, reserved;
    struct kvm_msr_entry entry[STATE_MSRS_MAX];
};

struct vcpu_state {
    struct kvm_regs regs;
    struct kvm_sregs sregs;
    struct kvm_vcpu_events events;
    struct kvm_mp_state mp_state;
    struct kvm_debugregs debugregs;
    struct kvm_xcrs xcrs;
    struct kvm_lapic_state lapic; /* where state_machine.lapic */
    struct state_msrs msrs;
    struct state_counters counters;
    uint32_t xsave_bytes;
    uint8_t xsave[STATE_XSAVE_BYTES_MAX] __attribute__((aligned(8)));
};

struct machine_state {
    struct state_machine machine;
    struct state_cpuid cpuid;
    uint32_t vcpus;
    uint64_t memory_bytes;
    struct vcpu_state vcpu[MACHINE_VCPUS_MAX];
};

/* Bytes written, or -ENOSPC. */
int64_t state_write(const struct machine_state *state, uint8_t *bytes, size_t capacity_bytes);
/* NULL, or what it is refused for. `state` says in vcpus, memory_bytes, machine.lapic and vcpu[0].xsave_bytes what it must be for, and is
 * otherwise overwritten. */
const char *state_read(struct machine_state *state, const uint8_t *bytes, size_t size_bytes);

#endif
