/* See histogram.h. */
#include "histogram.h"

#include <string.h>

uint32_t histogram_bucket_of(uint64_t value_ns)
{
    if (value_ns < (1u << HISTOGRAM_OCTAVE_FIRST))
        return 0;
    uint32_t octave = 63u - (uint32_t)__builtin_clzll(value_ns);
    uint32_t step = (uint32_t)(value_ns >> (octave - 4)) & (HISTOGRAM_STEPS - 1);
    uint32_t bucket = (octave - HISTOGRAM_OCTAVE_FIRST) * HISTOGRAM_STEPS + step;
    return bucket < HISTOGRAM_BUCKETS ? bucket : HISTOGRAM_BUCKETS - 1;
}

uint64_t histogram_bucket_low_ns(uint32_t bucket)
{
    uint32_t octave = bucket / HISTOGRAM_STEPS + HISTOGRAM_OCTAVE_FIRST;
    uint64_t step = bucket % HISTOGRAM_STEPS;
    return (UINT64_C(1) << octave) + (step << (octave - 4));
}

void histogram_record(struct histogram *histogram, uint64_t value_ns)
{
    atomic_fetch_add_explicit(&histogram->bucket[histogram_bucket_of(value_ns)], 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&histogram->count, 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&histogram->sum_ns, value_ns, memory_order_relaxed);
    uint64_t max_ns = atomic_load_explicit(&histogram->max_ns, memory_order_relaxed);
    while (value_ns > max_ns &&
           !atomic_compare_exchange_weak_explicit(&histogram->max_ns, &max_ns, value_ns, memory_order_relaxed, memory_order_relaxed))
        ;
}

void histogram_clear(struct histogram *histogram)
{
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++)
        atomic_store_explicit(&histogram->bucket[i], 0, memory_order_relaxed);
    atomic_store_explicit(&histogram->count, 0, memory_order_relaxed);
    atomic_store_explicit(&histogram->sum_ns, 0, memory_order_relaxed);
    atomic_store_explicit(&histogram->max_ns, 0, memory_order_relaxed);
}

void histogram_read(const struct histogram *histogram, struct histogram_copy *copy)
{
    copy->count = 0;
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        copy->bucket[i] = atomic_load_explicit(&histogram->bucket[i], memory_order_relaxed);
        copy->count += copy->bucket[i];
    }
    copy->sum_ns = atomic_load_explicit(&histogram->sum_ns, memory_order_relaxed);
    copy->max_ns = atomic_load_explicit(&histogram->max_ns, memory_order_relaxed);
}

void histogram_add(struct histogram_copy *into, const struct histogram_copy *other)
{
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++)
        into->bucket[i] += other->bucket[i];
    into->count += other->count;
    into->sum_ns += other->sum_ns;
    if (other->max_ns > into->max_ns)
        into->max_ns = other->max_ns;
}

uint64_t histogram_quantile_ns(const struct histogram_copy *copy, double share)
{
    if (copy->count == 0)
        return 0;
    double target = share * (double)copy->count;
    uint64_t seen = 0;
    for (uint32_t i = 0; i < HISTOGRAM_BUCKETS; i++) {
        seen += copy->bucket[i];
        if (copy->bucket[i] != 0 && (double)seen >= target) {
            uint64_t low_ns = histogram_bucket_low_ns(i);
            uint64_t high_ns = i + 1 < HISTOGRAM_BUCKETS ? histogram_bucket_low_ns(i + 1) : low_ns;
            uint64_t middle_ns = (low_ns + high_ns) / 2;
            return middle_ns < copy->max_ns ? middle_ns : copy->max_ns;
        }
    }
    return copy->max_ns;
}

/* Bounds as (power of two, halves): 2^k or 1.5 * 2^k ns. Finest between 4 us and 4 ms, where faults are. */
static const struct {
    uint8_t octave, halves;
} folded_bound[HISTOGRAM_FOLDED_BUCKETS - 1] = {
    {10, 0}, {11, 0}, {12, 0}, {12, 1}, {13, 0}, {13, 1}, {14, 0}, {14, 1}, {15, 0}, {15, 1},
    {16, 0}, {16, 1}, {17, 0}, {17, 1}, {18, 0}, {18, 1}, {19, 0}, {19, 1}, {20, 0}, {20, 1},
    {21, 0}, {21, 1}, {22, 0}, {23, 0}, {24, 0}, {26, 0}, {28, 0}, {30, 0}, {33, 0},
};

uint64_t histogram_folded_bound_ns(uint32_t folded)
{
    if (folded >= HISTOGRAM_FOLDED_BUCKETS - 1)
        return UINT64_MAX;
    uint64_t power = UINT64_C(1) << folded_bound[folded].octave;
    return power + folded_bound[folded].halves * (power / 2);
}

void histogram_fold(const struct histogram_copy *copy, uint64_t cumulative[HISTOGRAM_FOLDED_BUCKETS])
{
    uint32_t bucket = 0;
    uint64_t seen = 0;
    for (uint32_t folded = 0; folded < HISTOGRAM_FOLDED_BUCKETS - 1; folded++) {
        uint32_t edge = histogram_bucket_of(histogram_folded_bound_ns(folded));
        for (; bucket < edge; bucket++)
            seen += copy->bucket[bucket];
        cumulative[folded] = seen;
    }
    cumulative[HISTOGRAM_FOLDED_BUCKETS - 1] = copy->count;
}
