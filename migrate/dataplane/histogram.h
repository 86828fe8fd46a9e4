/* Log-linear latency histogram: 16 buckets to each power of two, so a value is told to within 1/16 of its
 * octave and a bucket's middle is within 3.1 % of anything in it. 64 ns to 137 s; outside that the end buckets.
 * Any thread may record, any thread may read; nothing locks. */
#ifndef POSTCOPY_HISTOGRAM_H
#define POSTCOPY_HISTOGRAM_H

#include <stdatomic.h>
#include <stdint.h>
#include <time.h>

#define HISTOGRAM_OCTAVE_FIRST 6 /* 2^6 = 64 ns */
#define HISTOGRAM_OCTAVES 31     /* up to 2^37 ns = 137 s */
#define HISTOGRAM_STEPS 16
#define HISTOGRAM_BUCKETS (HISTOGRAM_OCTAVES * HISTOGRAM_STEPS)
#define HISTOGRAM_FOLDED_BUCKETS 30 /* for Prometheus, the last one +Inf */

struct histogram {
    _Atomic uint64_t bucket[HISTOGRAM_BUCKETS];
    _Atomic uint64_t count;
    _Atomic uint64_t sum_ns;
    _Atomic uint64_t max_ns;
};

/* A plain copy, as other code reads it. Counts are each exact; a copy taken while threads record may hold a value's
 * bucket and not yet its sum. */
struct histogram_copy {
    uint64_t bucket[HISTOGRAM_BUCKETS];
    uint64_t count;
    uint64_t sum_ns;
    uint64_t max_ns;
};

void histogram_record(struct histogram *histogram, uint64_t value_ns);
void histogram_clear(struct histogram *histogram);
void histogram_read(const struct histogram *histogram, struct histogram_copy *copy);
void histogram_add(struct histogram_copy *into, const struct histogram_copy *other);

/* The value below which the share (0..1) of all values lies, as the middle of its bucket; 0 when empty. */
uint64_t histogram_quantile_ns(const struct histogram_copy *copy, double share);

uint32_t histogram_bucket_of(uint64_t value_ns);
uint64_t histogram_bucket_low_ns(uint32_t bucket);

/* Cumulative counts at the fixed folded bounds; the last entry is the total. Bounds lie on bucket edges: folding is exact. */
void histogram_fold(const struct histogram_copy *copy, uint64_t cumulative[HISTOGRAM_FOLDED_BUCKETS]);
/* Upper bound of a folded bucket in ns; UINT64_MAX for the last. */
uint64_t histogram_folded_bound_ns(uint32_t folded);

static inline uint64_t clock_monotonic_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
