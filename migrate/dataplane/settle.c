/* Behind the pause: the source says which precopied pages are stale, the destination which pages it lacks.
 *
 * The guest is paused for good, so the last scan is final (P2): a page that it does not find is what the destination holds.
 * Should the scan fail, every page is stale, which is right in any case, only slower. What the destination then says it lacks
 * is what bulk has to send: nothing that this side remembers of precopy counts. */
#include <poll.h>

#include "dirty.h"
#include "result.h"
#include "source.h"
#include "verdict.h"

static bool is_stale(const void *of, uint64_t page)
{
    const struct source *source = of;
    return source->all_stale || atomic_load_explicit(&source->pending[page], memory_order_relaxed);
}

/* Once: the guest stays paused, and what was found is kept for the next epoch. */
static void find_stale(struct source *source)
{
    if (source->stale_is_found || source->all_stale)
        return;
    source->stale_is_found = true;
    uint64_t newly = atomic_load_explicit(&source->pages_pending, memory_order_relaxed); /* discarded since they were sent */
    if (dirty_collect(&source->memory, source->pagemap_fd, false, source->pending, &newly) != 0) {
        newly = source->memory.page_total;
        for (uint64_t page = 0; page < source->memory.page_total; page++)
            atomic_store_explicit(&source->pending[page], 1, memory_order_relaxed);
    }
    count(&source->pages_stale, newly);
}

static bool receive_exactly(struct source *source, struct channel *channel, void *buffer, size_t size_bytes, struct loop_result *result)
{
    for (size_t done_bytes = 0; done_bytes < size_bytes;) {
        if (!channel_wait(channel, source->stop_fd, result))
            return false;
        ssize_t received_bytes = channel_receive(channel, (char *)buffer + done_bytes, size_bytes - done_bytes, result);
        if (received_bytes < 0)
            return false;
        done_bytes += (size_t)received_bytes;
    }
    return true;
}

/* What it does not lack need not be sent. */
static void take_lacks(struct source *source, const struct frame_header *frame, const uint8_t *bits)
{
    const struct region *region = &source->memory.regions[frame->region];
    uint64_t first = region->first_page + frame->page_index, page_count = frame->length_bytes / region->memory.page_bytes;
    for (uint64_t i = 0; i < page_count; i++)
        if (!(bits[i / 8] >> i % 8 & 1))
            source_mark_sent(source, first + i);
}

static struct frame_verdict check_lacks(const struct memory *memory, const struct verdict_cursor *cursor, const struct frame_header *frame)
{
    struct frame_verdict verdict = frame_check(frame, 1u << FRAME_LACKS, memory->region_count);
    if (verdict.field != FRAME_FIELD_NONE)
        return verdict;
    const struct region *region = &memory->regions[frame->region];
    verdict = frame_check_range(frame, region->page_count, region->memory.page_bytes);
    return verdict.field == FRAME_FIELD_NONE ? verdict_check(memory, cursor, frame) : verdict;
}

static bool receive_lacks(struct source *source, struct channel *channel, struct loop_result *result)
{
    struct verdict_cursor cursor = {0};
    while (cursor.region < source->memory.region_count) {
        struct frame_header frame;
        uint8_t bits[VERDICT_BYTES_MAX];
        if (!receive_exactly(source, channel, &frame, sizeof(frame), result))
            return false;
        struct frame_verdict verdict = check_lacks(&source->memory, &cursor, &frame);
        if (verdict.field != FRAME_FIELD_NONE)
            return result_frame(result, LOOP_FRAME_INVALID, &frame, verdict);
        uint64_t page_count = frame.length_bytes / source->memory.regions[frame.region].memory.page_bytes;
        if (!receive_exactly(source, channel, bits, verdict_bytes(page_count), result))
            return false;
        take_lacks(source, &frame, bits);
        verdict_step(&source->memory, &cursor, page_count);
    }
    return true;
}

bool source_settle(struct source *source, struct channel *channel, struct loop_result *result)
{
    if (!source->stale_is_known) {
        source->all_stale |= source->pagemap_fd < 0; /* nothing was precopied, whatever a destination says that it holds */
        find_stale(source);
        if (!verdict_send(channel, &source->memory, FRAME_STALE, is_stale, source, source->stop_fd, result))
            return false;
    }
    return receive_lacks(source, channel, result);
}
