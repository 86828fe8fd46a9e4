/* A KVM guest's state from a hostile source: its size and checksum are put right, as that would; what is taken is what a machine may hold.
 *   byte 0   bit 0: size and checksum are left as they are. Bit 1: a valid state, in which the input changes words: {u16 word, u64 value} */
#include <string.h>

#include "fuzz.h"
#include "state.h"
#include "verify.h"

#define VCPUS 2
#define MEMORY_BYTES (UINT64_C(64) << 20)
#define XSAVE_BYTES 1024
#define HEADER_BYTES 40
#define CHECKSUM_OFFSET 8
#define SIZE_OFFSET 32

static void wants(struct machine_state *state)
{
    state->vcpus = VCPUS;
    state->memory_bytes = MEMORY_BYTES;
    state->machine.lapic = 1;
    for (uint32_t i = 0; i < VCPUS; i++)
        state->vcpu[i].xsave_bytes = XSAVE_BYTES;
}

static void seal(uint8_t *bytes, size_t size_bytes)
{
    uint64_t sum = mix64(size_bytes), word, size = size_bytes;
    if (size_bytes < HEADER_BYTES || size_bytes % 8 != 0)
        return;
    memcpy(bytes + SIZE_OFFSET, &size, sizeof(size));
    for (size_t offset = 0; offset < size_bytes; offset += sizeof(word)) {
        memcpy(&word, bytes + offset, sizeof(word));
        if (offset != CHECKSUM_OFFSET)
            sum = (sum ^ word) * UINT64_C(0x9e3779b97f4a7c15) + (sum >> 29);
    }
    sum = mix64(sum);
    memcpy(bytes + CHECKSUM_OFFSET, &sum, sizeof(sum));
}

static size_t changed(struct taker *taker, struct machine_state *state, uint8_t *bytes, size_t capacity_bytes)
{
    memset(state, 0, sizeof(*state));
    wants(state);
    state->machine.config = (struct machine_config){.seed = 3, .write_per_mille = 500, .beat_steps = 32};
    state->machine.tsc_khz = 2000000;
    int64_t size_bytes = state_write(state, bytes, capacity_bytes);
    CHECK(size_bytes > 0);
    while (taker->left_bytes >= 3) {
        size_t word = ((size_t)take(taker) << 8 | take(taker)) % ((size_t)size_bytes / 8);
        for (uint32_t i = 0; i < 8; i++)
            bytes[word * 8 + i] = take(taker);
    }
    return (size_t)size_bytes;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    static struct machine_state state;
    static uint8_t made[MACHINE_STATE_BYTES_MAX];
    struct taker taker = {data, size_bytes};
    uint8_t how = take(&taker);
    size_t made_bytes = taker.left_bytes < sizeof(made) ? taker.left_bytes : sizeof(made);
    if (how & 2)
        made_bytes = changed(&taker, &state, made, sizeof(made));
    else if (made_bytes > 0)
        memcpy(made, taker.data, made_bytes);
    if (!(how & 1))
        seal(made, made_bytes);
    uint8_t *exactly = malloc(made_bytes + (made_bytes == 0)); /* a read beyond it is seen */
    CHECK(exactly != NULL);
    memcpy(exactly, made, made_bytes);
    wants(&state);
    if (state_read(&state, exactly, made_bytes) == NULL) {
        CHECK(state.vcpus == VCPUS && state.machine.lapic == 1 && state.machine.config.beat_steps > 0);
        CHECK(state.cpuid.count <= STATE_CPUID_ENTRIES_MAX);
        for (uint32_t i = 0; i < VCPUS; i++)
            CHECK(state.vcpu[i].msrs.count <= STATE_MSRS_MAX);
    }
    free(exactly);
    return 0;
}
