/* The parser of a KVM guest's state alone, on bytes that nobody has checked: no KVM is needed, and sanitizers see every read.
 *   kvm-state-main [SEED [ROUNDS]]
 * A valid state is written, read back and compared. Then it is cut, lengthened, flipped, spliced and made up, its checksum put right again
 * each time (as a hostile source would): whatever comes out, it is either refused or within what a machine may hold. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "state.h"
#include "verify.h"
#include "../check.h"

#define VCPUS 2
#define MEMORY_BYTES (UINT64_C(64) << 20)
#define XSAVE_BYTES 4096
#define HEADER_BYTES 40
#define CHECKSUM_OFFSET 8
#define SIZE_OFFSET 32

static struct machine_state *wanted(void)
{
    struct machine_state *state = calloc(1, sizeof *state);
    CHECK(state != NULL);
    state->vcpus = VCPUS;
    state->memory_bytes = MEMORY_BYTES;
    state->machine.lapic = 1;
    for (uint32_t i = 0; i < VCPUS; i++)
        state->vcpu[i].xsave_bytes = XSAVE_BYTES;
    return state;
}

/* As state.c does it, written a second time. */
static void seal(uint8_t *bytes, size_t size_bytes)
{
    uint64_t sum = mix64(size_bytes), word, size = size_bytes;
    if (size_bytes < HEADER_BYTES || size_bytes % 8 != 0)
        return;
    memcpy(bytes + SIZE_OFFSET, &size, sizeof size);
    for (size_t offset = 0; offset < size_bytes; offset += 8) {
        memcpy(&word, bytes + offset, sizeof word);
        if (offset != CHECKSUM_OFFSET)
            sum = (sum ^ word) * UINT64_C(0x9e3779b97f4a7c15) + (sum >> 29);
    }
    sum = mix64(sum);
    memcpy(bytes + CHECKSUM_OFFSET, &sum, sizeof sum);
}

/* From a heap block of exactly that size: a read beyond it is seen. */
static const char *read_exactly(struct machine_state *into, const uint8_t *bytes, size_t size_bytes)
{
    uint8_t *copy = malloc(size_bytes + (size_bytes == 0));
    CHECK(copy != NULL);
    memcpy(copy, bytes, size_bytes);
    into->vcpus = VCPUS;
    into->memory_bytes = MEMORY_BYTES;
    into->machine.lapic = 1;
    const char *wrong = state_read(into, copy, size_bytes);
    free(copy);
    if (wrong == NULL) {
        CHECK(into->vcpus == VCPUS && into->machine.lapic == 1 && into->machine.config.beat_steps > 0);
        CHECK(into->cpuid.count <= STATE_CPUID_ENTRIES_MAX && into->vcpu[0].msrs.count <= STATE_MSRS_MAX);
    }
    return wrong;
}

static int64_t valid_state(uint8_t *bytes)
{
    struct machine_state *state = wanted();
    state->machine.config = (struct machine_config){.seed = 3, .write_per_mille = 500, .beat_steps = 32};
    state->machine.tsc_khz = 2000000;
    state->cpuid.count = 5;
    for (uint32_t i = 0; i < VCPUS; i++) {
        memset(state->vcpu[i].xsave, (int)i + 1, XSAVE_BYTES);
        state->vcpu[i].regs.rip = 0x100000000 + i;
        state->vcpu[i].msrs.count = 11;
        state->vcpu[i].counters.steps = 1000 + i;
    }
    int64_t size_bytes = state_write(state, bytes, MACHINE_STATE_BYTES_MAX);
    CHECK(size_bytes > 0);
    CHECK(state_write(state, bytes, (size_t)size_bytes - 1) == -28 /* ENOSPC */);
    CHECK(state_write(state, bytes, MACHINE_STATE_BYTES_MAX) == size_bytes);
    struct machine_state *back = wanted();
    CHECK(read_exactly(back, bytes, (size_t)size_bytes) == NULL);
    CHECK(memcmp(back, state, sizeof *state) == 0);
    free(back);
    free(state);
    return size_bytes;
}

static uint64_t next(uint64_t *seed, uint64_t end)
{
    return mix64(*seed += UINT64_C(0x9e3779b97f4a7c15)) % end;
}

/* Another state; its size in bytes, at most `size_bytes`. */
static size_t mutate(uint64_t *seed, uint8_t *bytes, size_t size_bytes)
{
    size_t at = next(seed, size_bytes), words = size_bytes / 8;
    switch (next(seed, 5)) {
    case 0: /* cut */
        return next(seed, 2) ? at : at / 8 * 8;
    case 1: /* bits */
        for (uint64_t i = next(seed, 8) + 1; i > 0; i--)
            bytes[next(seed, size_bytes)] ^= (uint8_t)(1u << next(seed, 8));
        return size_bytes;
    case 2: { /* a word that a length or a count may be */
        static const uint64_t values[] = {0, 1, 8, 0xffff, 0xffffffff, UINT64_C(0xffffffff00000000), UINT64_MAX, 4096};
        memcpy(bytes + next(seed, words) * 8, &values[next(seed, 8)], 8);
        return size_bytes;
    }
    case 3: { /* a stretch to another place */
        size_t from = next(seed, words) * 8, to = next(seed, words) * 8, length = next(seed, words) * 8;
        size_t most = size_bytes - (from > to ? from : to);
        memmove(bytes + to, bytes + from, length < most ? length : most);
        return size_bytes;
    }
    default: /* made up behind the header */
        for (size_t i = HEADER_BYTES; i < size_bytes; i++)
            bytes[i] = (uint8_t)next(seed, 256);
        return size_bytes;
    }
}

int main(int argc, char **argv)
{
    static uint8_t valid[MACHINE_STATE_BYTES_MAX], bytes[MACHINE_STATE_BYTES_MAX];
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 10) : 1, rounds = argc > 2 ? strtoull(argv[2], NULL, 10) : 20000;
    uint64_t refused = 0, taken = 0;
    size_t valid_bytes = (size_t)valid_state(valid);
    struct machine_state *into = wanted();
    for (uint64_t round = 0; round < rounds; round++) {
        memcpy(bytes, valid, valid_bytes);
        size_t size_bytes = mutate(&seed, bytes, valid_bytes);
        if (next(&seed, 8) != 0)
            seal(bytes, size_bytes);
        if (read_exactly(into, bytes, size_bytes) != NULL)
            refused++;
        else
            taken++;
    }
    free(into);
    CHECK(refused > rounds / 4 && taken > rounds / 100); /* both ways were gone: a parser that refuses all would pass otherwise */
    puts("state: held");
    return 0;
}
