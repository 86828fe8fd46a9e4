/* See verdict.h. A GiB of 4 KiB pages is 32 KiB of bits, whatever was written: bounded, and cheap to apply in order. */
#include "verdict.h"

#include <string.h>

static uint64_t pages_per_frame(const struct region *region)
{
    uint64_t longest = FRAME_LENGTH_BYTES_MAX / region->memory.page_bytes;
    return longest < VERDICT_PAGES_MAX ? longest : VERDICT_PAGES_MAX;
}

bool verdict_next(const struct memory *memory, struct verdict_cursor *cursor, enum frame_kind kind, struct frame_header *frame)
{
    if (cursor->region == memory->region_count)
        return false;
    const struct region *region = &memory->regions[cursor->region];
    uint64_t page_count = region->page_count - cursor->page_index;
    if (page_count > pages_per_frame(region))
        page_count = pages_per_frame(region);
    *frame = (struct frame_header){
        .magic = FRAME_MAGIC,
        .kind = (uint8_t)kind,
        .region = cursor->region,
        .page_index = cursor->page_index,
        .length_bytes = (uint32_t)(page_count * region->memory.page_bytes),
    };
    verdict_step(memory, cursor, page_count);
    return true;
}

void verdict_step(const struct memory *memory, struct verdict_cursor *cursor, uint64_t page_count)
{
    cursor->page_index += page_count;
    if (cursor->page_index == memory->regions[cursor->region].page_count)
        *cursor = (struct verdict_cursor){.region = cursor->region + 1};
}

struct frame_verdict verdict_check(const struct memory *memory, const struct verdict_cursor *cursor, const struct frame_header *frame)
{
    if (frame->region != cursor->region)
        return (struct frame_verdict){FRAME_FIELD_REGION, cursor->region, frame->region};
    if (frame->page_index != cursor->page_index)
        return (struct frame_verdict){FRAME_FIELD_PAGE_INDEX, cursor->page_index, frame->page_index};
    const struct region *region = &memory->regions[frame->region];
    uint64_t longest_bytes = pages_per_frame(region) * region->memory.page_bytes;
    if (frame->length_bytes > longest_bytes)
        return (struct frame_verdict){FRAME_FIELD_LENGTH, longest_bytes, frame->length_bytes};
    return (struct frame_verdict){FRAME_FIELD_NONE, 0, 0};
}

bool verdict_send(struct channel *channel, const struct memory *memory, enum frame_kind kind, verdict_bit *bit, const void *of, int stop_fd,
                  struct loop_result *result)
{
    struct verdict_cursor cursor = {0};
    struct frame_header frame;
    while (verdict_next(memory, &cursor, kind, &frame)) {
        const struct region *region = &memory->regions[frame.region];
        uint64_t page_count = frame.length_bytes / region->memory.page_bytes, first = region->first_page + frame.page_index;
        uint8_t bits[VERDICT_BYTES_MAX];
        memset(bits, 0, verdict_bytes(page_count));
        for (uint64_t i = 0; i < page_count; i++)
            bits[i / 8] |= (uint8_t)(bit(of, first + i) << i % 8);
        struct iovec pieces[2] = {{&frame, FRAME_HEADER_BYTES}, {bits, verdict_bytes(page_count)}};
        if (!channel_send_all(channel, pieces, 2, stop_fd, result))
            return false;
    }
    return true;
}
