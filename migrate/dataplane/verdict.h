/* One bit a page over a whole memory, in frames: the stale set (source to destination) and what the destination lacks (back).
 * Each frame covers a range of one region, its payload is that range's bits, least significant first. The frames of one set
 * come in the order of the memory and leave nothing out, so that the last one is known to be the last. */
#ifndef POSTCOPY_VERDICT_H
#define POSTCOPY_VERDICT_H

#include "channel.h"
#include "frame.h"
#include "memory.h"

#define VERDICT_PAGES_MAX 32768u /* a frame: 4 KiB of bits */
#define VERDICT_BYTES_MAX (VERDICT_PAGES_MAX / 8)

static inline uint64_t verdict_bytes(uint64_t page_count)
{
    return (page_count + 7) / 8;
}

/* Where the next frame of a set begins; region == region_count: the set is whole. */
struct verdict_cursor {
    uint32_t region;
    uint64_t page_index;
};

/* The frame that comes next, its header filled in. False: the set is whole. */
bool verdict_next(const struct memory *memory, struct verdict_cursor *cursor, enum frame_kind kind, struct frame_header *frame);
/* Is this the frame that must come next? */
struct frame_verdict verdict_check(const struct memory *memory, const struct verdict_cursor *cursor, const struct frame_header *frame);
void verdict_step(const struct memory *memory, struct verdict_cursor *cursor, uint64_t page_count);

/* bit(of, flat page): is the page's bit set? */
typedef bool verdict_bit(const void *of, uint64_t page);
/* Send a whole set. False: result says why not. */
bool verdict_send(struct channel *channel, const struct memory *memory, enum frame_kind kind, verdict_bit *bit, const void *of, int stop_fd,
                  struct loop_result *result);

#endif
