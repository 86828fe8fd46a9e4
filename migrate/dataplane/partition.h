/* Which bulk connection a page belongs to while it is precopied: always the same one.
 *
 * A page is sent in several rounds, and only what comes over one connection keeps its order: an earlier copy that came by
 * another could overtake a later one and be held in its place, with no scan to find it (tests/model/stream_order.py). So memory
 * is cut into chunks of 2 MiB, or one page where that is more, and dealt out in turn: long enough for whole runs, short enough
 * that what a guest writes is spread over all connections. */
#ifndef POSTCOPY_PARTITION_H
#define POSTCOPY_PARTITION_H

#include "memory.h"

struct partition {
    const struct memory *memory;
    uint32_t stream, streams; /* the pages of connection `stream`, of 0 .. streams - 1 */
};

/* Pages [*page, *end) are all ours and of one region, as many as there are in a row. The first ones at or behind *page, which is
 * moved there. False: there are none. */
bool partition_next(const struct partition *partition, uint64_t *page, uint64_t *end);

#endif
