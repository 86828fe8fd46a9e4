/* The regions of one guest, and how a page is named: by (region, page index) on the wire, by one flat number inside. */
#ifndef POSTCOPY_MEMORY_H
#define POSTCOPY_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>

#include "dataplane.h"

#define STEER_NONE UINT64_MAX /* no page to go on from */

struct region {
    struct memory_region memory;
    uint64_t first_page; /* flat number of its page 0 */
    uint64_t page_count;
    bool is_hugetlb;
    char *alias; /* second mapping, never registered; NULL where touching it could raise SIGBUS */
};

struct memory {
    struct region regions[REGIONS_MAX];
    uint32_t region_count;
    uint64_t page_total;
    uint32_t page_bytes_max;
};

/* 0 or an errno. */
int memory_init(struct memory *memory, const struct memory_region *regions, uint32_t region_count);
/* Seal the files against shrinking where that is possible and map those aliases. 0 or an errno. */
int memory_map_aliases(struct memory *memory);
void memory_deinit(struct memory *memory);

/* The region of a flat page number below page_total. */
const struct region *memory_at_page(const struct memory *memory, uint64_t page);
/* The region that holds a guest address; NULL when none does. */
const struct region *memory_at_address(const struct memory *memory, uint64_t address);

static inline void count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

static inline uint64_t region_file_offset(const struct region *region, uint64_t page_index)
{
    return region->memory.offset_bytes + page_index * region->memory.page_bytes;
}

#endif
