/* Which block a thread works on next: one function, inlined into the step. Internal to the workload. */
#ifndef POSTCOPY_WORKLOAD_PATTERN_H
#define POSTCOPY_WORKLOAD_PATTERN_H

#include <stdint.h>

#include "verify.h"

/* What of it travels in the guest's state. */
struct pattern_state {
    uint64_t random;   /* splitmix64's counter */
    uint64_t position; /* sequential, permute: blocks done in this pass */
    uint64_t key;      /* permute: of this pass's order; zipf: of the scatter of ranks over blocks */
    uint64_t carried;  /* chase: the last word of the block last read */
};

struct pattern {
    uint32_t kind; /* enum workload_pattern */
    uint32_t shift;
    uint64_t blocks; /* < 2^32 */
    uint64_t mask;
    double zipf_top; /* (blocks + 1) ^ ZIPF_TAIL */
    struct pattern_state state;
};

/* Zipf with s = 0.99 by inversion of its continuous law: rank = (1 + u * (N^0.01 - 1))^100, and a hundredth power is
 * eight multiplications. No table, no libm. */
static inline double power_100(double base)
{
    double power_4 = base * base * base * base;
    double power_8 = power_4 * power_4, power_16 = power_8 * power_8, power_32 = power_16 * power_16;
    return power_32 * power_32 * power_32 * power_4;
}

static inline uint64_t pattern_random(struct pattern *pattern)
{
    return mix64(pattern->state.random += UINT64_C(0x9e3779b97f4a7c15));
}

static inline uint64_t bounded(uint64_t random, uint64_t end)
{
    return ((random >> 32) * end) >> 32;
}

/* A bijection of [0, blocks): rounds of bijections on the next power of two, repeated until back inside (at most two
 * times on average). */
static inline uint64_t pattern_permute(const struct pattern *pattern, uint64_t index)
{
    uint64_t key = pattern->state.key;
    do {
        for (uint32_t round = 0; round < 3; round++) {
            index = (index * UINT64_C(0xd1342543de82ef95) + (key >> (16 * round))) & pattern->mask;
            index ^= index >> pattern->shift;
        }
    } while (index >= pattern->blocks);
    return index;
}

static inline void pattern_init(struct pattern *pattern, uint32_t kind, uint64_t blocks, uint64_t seed)
{
    uint32_t bits = blocks > 1 ? 64 - (uint32_t)__builtin_clzll(blocks - 1) : 0;
    double low = 1, high = 2; /* 2^32 ^ 0.01 = 1.25 */
    for (uint32_t i = 0; kind == WORKLOAD_ZIPF && i < 60; i++) {
        double middle = (low + high) / 2;
        if (power_100(middle) < (double)(blocks + 1))
            low = middle;
        else
            high = middle;
    }
    *pattern = (struct pattern){
        .kind = kind, .shift = bits / 2 + 1, .blocks = blocks, .mask = (UINT64_C(1) << bits) - 1, .zipf_top = low,
        .state = {.random = mix64(seed), .key = mix64(seed ^ UINT64_C(0x2545f4914f6cdd1d))},
    };
}

/* The next data index, < blocks. */
static inline uint64_t pattern_next(struct pattern *pattern)
{
    struct pattern_state *state = &pattern->state;
    uint64_t position = state->position;
    switch (pattern->kind) {
    case WORKLOAD_SEQUENTIAL:
        state->position = position + 1 < pattern->blocks ? position + 1 : 0;
        return position;
    case WORKLOAD_PERMUTE: {
        uint64_t index = pattern_permute(pattern, position);
        state->position = position + 1;
        if (state->position == pattern->blocks) {
            state->position = 0;
            state->key = mix64(state->key + 1);
        }
        return index;
    }
    case WORKLOAD_ZIPF: {
        double share = (double)(pattern_random(pattern) >> 11) * 0x1p-53;
        uint64_t rank = (uint64_t)power_100(1 + share * (pattern->zipf_top - 1)) - 1;
        return pattern_permute(pattern, rank < pattern->blocks ? rank : pattern->blocks - 1);
    }
    case WORKLOAD_CHASE: /* the content gives the next block; the random part keeps the walk out of short cycles */
        return bounded(mix64(state->carried + pattern_random(pattern)), pattern->blocks);
    default:
        return bounded(pattern_random(pattern), pattern->blocks);
    }
}

#endif
