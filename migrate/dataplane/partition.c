/* See partition.h. */
#include "partition.h"

#define CHUNK_BYTES (2u << 20)

bool partition_next(const struct partition *partition, uint64_t *page, uint64_t *end)
{
    const struct memory *memory = partition->memory;
    while (*page < memory->page_total) {
        const struct region *region = memory_at_page(memory, *page);
        uint64_t page_bytes = region->memory.page_bytes, page_index = *page - region->first_page;
        uint64_t chunk_pages = page_bytes < CHUNK_BYTES ? CHUNK_BYTES / page_bytes : 1, chunk = page_index / chunk_pages;
        uint64_t region_end = region->first_page + region->page_count;
        *end = partition->streams == 1 ? region_end : region->first_page + (chunk + 1) * chunk_pages;
        if (*end > region_end)
            *end = region_end;
        /* by region too: the first chunks of many small regions are not all ours */
        if ((chunk + (uint64_t)(region - memory->regions)) % partition->streams == partition->stream)
            return true;
        *page = *end;
    }
    return false;
}
