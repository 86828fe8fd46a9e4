/* Pages that come in pieces: 2 MiB and 1 GiB, which nobody wants to hold in a buffer nor wait for as a whole.
 *
 * Such a page is claimed by the chunk (FRAME_CHUNK_BYTES): any connection may bring any chunk of any page, in any order, and each is
 * brought into place as it comes. The page's byte (pages.h) goes ABSENT | REQUESTED -> RECEIVING with the first and RECEIVING -> PRESENT
 * with the last of them; WANTED is kept meanwhile. PRESENT says that all are in place, and only then is the page mapped.
 *
 * P1: who sets a chunk's CLAIMED writes it, nobody else ever does, and a page is PRESENT when all of its chunks were claimed and written:
 * so none is written afterwards. A claim lasts for one copy, out of the hot buffer or of a socket that has all of it, never for a wait. A connection that is cut in
 * the middle of a page leaves it RECEIVING, which counts as ABSENT: it is not final, nothing of it is mapped.
 *
 * Discards. The page is DISCARDED at once, which refuses further chunks; it is closed, made a hole, and left as REMOVED by whoever finds
 * it discarded and sees nobody writing: who discards, or who writes last. Each says first what it has to say, and looks then, both in
 * one total order: so one of them closes it; closing is a compare-and-swap: so only one.
 *
 * A chunk of zeroes costs nothing where the file has nothing there (waiting memory was emptied before the migration), else what is there
 * is cleared. A page all of whose chunks are zero is ZERO.
 *
 * Precopy, while the guest runs at the source, claims the page itself for each chunk and leaves it as it was in between: ABSENT until
 * all chunks have come once, then HELD. A later round overwrites chunk by chunk; what is between two rounds is torn, and never judged:
 * the mark that ends precopy comes behind whole pages. These chunks are not CLAIMED: what the stale set finds lacking is free again. */
#ifndef POSTCOPY_CLAIMS_H
#define POSTCOPY_CLAIMS_H

#include "memory.h"
#include "place.h"

struct destination;

struct claims {
    _Atomic uint8_t *chunk; /* of each chunk: who has it, what has come */
    _Atomic uint64_t *page; /* of each page in chunks: how many of these (claims.c) */
};

/* What brings the bytes of a chunk: out of the hot buffer; or, where the kernel can bring them to where they belong, by that. It
 * never waits. */
struct chunk_bytes {
    const char *bytes;                               /* in the buffer; NULL: zeroes, unless */
    int (*fill)(struct chunk_bytes *of, char *into); /* it is called with where they belong. 0 or an errno */
};

/* 0 or ENOMEM. */
int claims_init(struct claims *claims, const struct memory *memory);
void claims_deinit(struct claims *claims);

/* Chunks, counted inside the region, of final content; bytes is NULL for zeroes. To where faults end. False: result says why. */
bool claims_take(struct destination *destination, const struct region *region, uint64_t chunk_index, uint64_t chunk_count,
                 const char *bytes, enum page_path path, struct loop_result *result);
/* The same of a round of precopy: to be held. */
bool claims_hold(struct destination *destination, const struct region *region, uint64_t chunk_index, uint64_t chunk_count,
                 const char *bytes, struct loop_result *result);
/* The same of one chunk, held or final, wherever its bytes are; where nobody needs them they stay there. */
bool claims_take_one(struct destination *destination, const struct region *region, uint64_t chunk_index, struct chunk_bytes *from, bool held,
                     enum page_path path, struct loop_result *result);
/* While no loop runs: chunks that are in place stay, what is missing of their pages is lacking, or asked for by who waits; each may come
 * once more by each path. */
void claims_next_epoch(struct destination *destination);
/* Of a daemon's earlier life: nothing is known of this page's chunks but that the file may hold something of each. */
void claims_restore(struct claims *claims, const struct region *region, uint64_t page_index);
/* The guest has discarded these pages. punch: not by itself, or too early. */
bool claims_discard(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count, bool punch,
                    struct loop_result *result);

#endif
