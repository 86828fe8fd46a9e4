/* The regions of one guest, and how a page is named: by (region, page index) on the wire, by one flat number inside. */
#ifndef POSTCOPY_MEMORY_H
#define POSTCOPY_MEMORY_H

#include <stdatomic.h>
#include <stdbool.h>

#include "dataplane.h"
#include "frame.h"

#define STEER_NONE UINT64_MAX /* no page to go on from */

struct region {
    struct memory_region memory;
    uint64_t first_page; /* flat number of its page 0 */
    uint64_t page_count;
    uint32_t page_chunks;  /* of a page that comes in pieces (claims.h); 0: pages come whole */
    uint64_t first_chunk, first_large; /* flat numbers of its first chunk, and of page 0 among those that have chunks */
    bool is_hugetlb;
    char *alias; /* second mapping, never registered; NULL where touching it could raise SIGBUS */
};

struct memory {
    struct region regions[REGIONS_MAX];
    uint32_t region_count;
    uint64_t page_total;
    uint64_t chunk_total, large_total; /* only of regions whose pages come in pieces */
    uint32_t unit_bytes_max;           /* the largest page that comes whole, or a chunk */
};

/* 0 or an errno. */
int memory_init(struct memory *memory, const struct memory_region *regions, uint32_t region_count);
/* Seal the files against shrinking where that is possible and map those aliases. 0 or an errno. */
int memory_map_aliases(struct memory *memory);
/* At the source: large pages are sent from a mapping of hugetlbfs files, where a page takes one entry of the page tables. Only the kernel
 * touches it, which answers EFAULT where we would be sent SIGBUS; where it cannot be mapped there is none. */
void memory_map_large(struct memory *memory);
void memory_deinit(struct memory *memory);

/* The region of a flat page number below page_total. */
const struct region *memory_at_page(const struct memory *memory, uint64_t page);
/* The region that holds a guest address; NULL when none does. */
const struct region *memory_at_address(const struct memory *memory, uint64_t address);

static inline void count(_Atomic uint64_t *counter, uint64_t by)
{
    atomic_fetch_add_explicit(counter, by, memory_order_relaxed);
}

/* What is claimed, read and told zero from content at once: a page, or a chunk of a larger one. */
static inline uint32_t region_unit_bytes(const struct region *region)
{
    return region->page_chunks > 0 ? FRAME_CHUNK_BYTES : region->memory.page_bytes;
}

static inline uint64_t region_file_offset(const struct region *region, uint64_t page_index)
{
    return region->memory.offset_bytes + page_index * region->memory.page_bytes;
}

#endif
