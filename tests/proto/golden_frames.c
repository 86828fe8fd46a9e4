/* The C side of the golden vectors: says on stdout what frame.h makes of the headers on stdin; test_frame.py compares.
 *
 *   region PAGE_COUNT PAGE_BYTES   one more region
 *   frame  ACCEPTS HEX             ->  FIELD EXPECTED GOT  MAGIC KIND FLAGS REGION PAGE_INDEX OFFSET_BYTES LENGTH_BYTES
 *   preamble HEX                   ->  MAJOR MINOR KIND EPOCH STREAM_INDEX  (by the offsets in PROTOCOL.md)
 *
 * Any line that is not one of these ends the program with status 2. */
#include "frame.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#define REGIONS_MAX 64
#define PREAMBLE_BYTES 64

struct preamble {
    char magic[8];
    uint16_t major, minor;
    uint8_t kind, reserved[3];
    uint8_t migration_id[16];
    uint32_t epoch, stream_index;
    uint8_t token[16], reserved_too[8];
};
_Static_assert(sizeof(struct preamble) == PREAMBLE_BYTES, "preamble size");

static struct {
    uint64_t page_count, page_bytes;
} regions[REGIONS_MAX];
static uint32_t region_count;

/* 0 unless text is exactly 2 * size_bytes hexadecimal digits. */
static int from_hex(const char *text, void *bytes, size_t size_bytes)
{
    if (strlen(text) != 2 * size_bytes)
        return 0;
    for (size_t i = 0; i < size_bytes; i++) {
        unsigned int value;

        if (sscanf(text + 2 * i, "%2x", &value) != 1)
            return 0;
        ((uint8_t *)bytes)[i] = (uint8_t)value;
    }
    return 1;
}

static void judge(const struct frame_header *frame, uint32_t accepts)
{
    struct frame_verdict verdict = frame_check(frame, accepts, region_count);

    if (verdict.field == FRAME_FIELD_NONE)
        verdict = frame_check_range(frame, regions[frame->region].page_count, regions[frame->region].page_bytes);
    printf("%d %" PRIu64 " %" PRIu64 " %u %u %u %" PRIu32 " %" PRIu64 " %" PRIu32 " %" PRIu32 "\n", (int)verdict.field,
           verdict.expected, verdict.got, frame->magic, frame->kind, frame->flags, frame->region, frame->page_index,
           frame->offset_bytes, frame->length_bytes);
}

int main(void)
{
    char line[256], hex[160];

    while (fgets(line, sizeof(line), stdin)) {
        struct frame_header frame;
        struct preamble preamble;
        uint64_t page_count, page_bytes;
        uint32_t accepts;

        if (sscanf(line, "region %" SCNu64 " %" SCNu64, &page_count, &page_bytes) == 2 && region_count < REGIONS_MAX) {
            regions[region_count].page_count = page_count;
            regions[region_count++].page_bytes = page_bytes;
        } else if (sscanf(line, "frame %" SCNu32 " %159s", &accepts, hex) == 2 && from_hex(hex, &frame, sizeof(frame))) {
            judge(&frame, accepts);
        } else if (sscanf(line, "preamble %159s", hex) == 1 && from_hex(hex, &preamble, sizeof(preamble))) {
            printf("%u %u %u %" PRIu32 " %" PRIu32 "\n", preamble.major, preamble.minor, preamble.kind, preamble.epoch,
                   preamble.stream_index);
        } else {
            fprintf(stderr, "not understood: %s", line);
            return 2;
        }
    }
    return 0;
}
