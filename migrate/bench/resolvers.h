/* What the parts of the resolvers program share. resolvers.c says what it is and how it is used. Failures, the deadline, random
 * numbers and CPU time are the floor's (floor_process.c, floor_memory.c). */
#ifndef POSTCOPY_RESOLVERS_H
#define POSTCOPY_RESOLVERS_H

#include <stdbool.h>
#include <stdint.h>

#include "histogram.h"

#define SMALL_PAGE_BYTES 4096u
#define HUGE_PAGE_BYTES (2u << 20)
#define HOT_BYTES HUGE_PAGE_BYTES /* the largest range that takes content along: 512 pages, or one huge one */

enum memory_kind { ANONYMOUS, SHMEM, HUGETLB };

/* Pages that are absent until the way resolves them. Nothing but a touch under test reads `mapping` before. */
struct area {
    const struct way *way;
    uint64_t pages, page_bytes, seed;
    int userfaultfd, memfd;  /* memfd: -1 for anonymous memory */
    unsigned char *mapping;  /* registered */
    unsigned char *alias;    /* second mapping of the file; anonymous memory has none */
    unsigned char *received; /* where MOVE takes its pages from; the other ways have none */
    unsigned char *hot;      /* HOT_BYTES: what has just been received, and lies in the cache */
};

/* One way to resolve a fault. */
struct way {
    const char *name;
    enum memory_kind kind;
    uint64_t features;    /* for UFFDIO_API */
    const char *needs;    /* the kernel that has them */
    uint64_t modes;       /* for UFFDIO_REGISTER */
    uint64_t fault_flags; /* of the event that a touch makes */
    bool zero;            /* its pages are zero */
    bool in_place;        /* the touching thread's signal handler resolves */
    /* Brings all content to where the way takes it from, before any touch; NULL: the way takes it from the hot buffer. */
    void (*fill)(const struct area *area);
    /* Resolves pages [page, page + count), all absent: mapped, content in place, whoever waits is woken. */
    void (*resolve)(const struct area *area, uint64_t page, uint64_t count);
};

/* resolvers_ways.c */
const struct way *way_named(const char *name); /* NULL: there is none */
const char *way_name(uint32_t index);          /* NULL: past the last */

/* resolvers_memory.c. Every failure ends the program; where the machine lacks what a way needs, area_create prints a JSON object
 * that says so and ends it with status 0. */
void area_warm(uint64_t size_bytes); /* touch that much memory and let it go: floor.c says why */
void area_create(struct area *area, const struct way *way, uint64_t pages, uint64_t seed);
void area_destroy(struct area *area);
uint64_t area_first_word(const struct area *area, uint64_t page);
void area_make_hot(const struct area *area, uint64_t page, uint64_t count); /* the hot buffer holds these pages' content */
void area_check(const struct area *area);                                   /* every byte of every page, all mapped */

/* resolvers_touch.c: one thread touches every page once, in random order. */
enum placement { UNPINNED, ONE_CPU, TWO_CPUS, PLACEMENTS };
struct touches {
    struct histogram latency;
    double cpu_seconds; /* of this process, both threads */
};
bool placement_is_there(const struct way *way, enum placement placement); /* enough CPUs, enough threads */
void touch_all(struct area *area, enum placement placement, struct touches *touches);

#endif
