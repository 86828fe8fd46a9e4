/* A header that is taken names pages that there are, and no more bytes than may come. 24 bytes, then 8 of the region it is held against. */
#include <string.h>

#include "frame.h"
#include "fuzz.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    static const uint64_t page_bytes_of[] = {4096, 2u << 20, 1u << 30};
    struct frame_header frame;
    uint64_t how = 0;
    if (size_bytes < sizeof(frame))
        return 0;
    memcpy(&frame, data, sizeof(frame));
    memcpy(&how, data + sizeof(frame), size_bytes - sizeof(frame) < sizeof(how) ? size_bytes - sizeof(frame) : sizeof(how));
    uint64_t page_bytes = page_bytes_of[how % 3], page_count = 1 + (how >> 8) % (UINT64_C(1) << 38);
    uint32_t region_count = 1 + (uint32_t)(how >> 2 & 63), accepts = (uint32_t)(how >> 16);
    struct frame_verdict verdict = frame_check(&frame, accepts, region_count);
    if (verdict.field != FRAME_FIELD_NONE)
        return 0;
    CHECK(frame.region < region_count && frame.kind < 32 && (accepts >> frame.kind & 1));
    verdict = frame_check_range(&frame, page_count, page_bytes);
    if (verdict.field != FRAME_FIELD_NONE)
        return 0;
    CHECK(frame.length_bytes > 0 && frame.length_bytes <= FRAME_LENGTH_BYTES_MAX && frame.page_index < page_count);
    __uint128_t start = (__uint128_t)frame.page_index * page_bytes + frame.offset_bytes, end = start + frame.length_bytes;
    CHECK(end <= (__uint128_t)page_count * page_bytes);
    uint64_t unit_bytes = page_bytes > FRAME_CHUNK_BYTES ? FRAME_CHUNK_BYTES : page_bytes;
    CHECK(start % unit_bytes == 0 && frame.length_bytes % unit_bytes == 0);
    CHECK((frame.flags == FRAME_FLAG_MORE) == (end % page_bytes != 0));
    return 0;
}
