/* The data frame header: every byte that crosses an urgent or bulk connection is one of these or payload behind one.
 * PROTOCOL.md describes it in words, frame.py mirrors it, golden/frames.json holds vectors that both sides read.
 * Fixed size, little-endian, no padding: the struct is the wire. */
#ifndef POSTCOPY_FRAME_H
#define POSTCOPY_FRAME_H

#include <stddef.h>
#include <stdint.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the wire is little-endian and the header is used in place");

#define FRAME_MAGIC 0x4350u /* the bytes 'P' 'C' */
#define FRAME_HEADER_BYTES 24
#define FRAME_LENGTH_BYTES_MAX 0x40000000u /* 1 GiB: the largest page, the longest run */

enum frame_kind {
    FRAME_REQUEST = 1, /* destination -> source: send these pages; no payload */
    FRAME_PAGES = 2,   /* source -> destination: length_bytes of payload follow */
    FRAME_ZERO = 3,    /* source -> destination: length_bytes of memory are zero; no payload */
    FRAME_STALE = 4,   /* source -> destination: a bit a page of length_bytes of memory follows; set: what you hold is old */
    FRAME_MARK = 5,    /* source -> destination: end of precopy on this connection; all fields behind kind are zero */
    FRAME_LACKS = 6,   /* destination -> source: a bit a page of length_bytes of memory follows; set: not here */
    FRAME_AHEAD = 7,   /* source -> destination: as PAGES, that nobody asked for: readahead behind those that were */
    FRAME_AHEAD_ZERO = 8, /* source -> destination: the same as ZERO */
};

#define FRAME_FLAG_MORE 0x01u /* reserved: more chunks of this page follow */

struct frame_header {
    uint16_t magic;
    uint8_t kind;
    uint8_t flags;
    uint32_t region;       /* index into the regions of the offer */
    uint64_t page_index;   /* first page, counted inside the region in its own page size */
    uint32_t offset_bytes; /* inside that page; 0 unless the page comes in chunks */
    uint32_t length_bytes; /* a whole number of pages unless the page comes in chunks */
};

_Static_assert(sizeof(struct frame_header) == FRAME_HEADER_BYTES, "frame header size");
_Static_assert(offsetof(struct frame_header, region) == 4, "frame header layout");
_Static_assert(offsetof(struct frame_header, page_index) == 8, "frame header layout");
_Static_assert(offsetof(struct frame_header, offset_bytes) == 16, "frame header layout");
_Static_assert(offsetof(struct frame_header, length_bytes) == 20, "frame header layout");

/* What is wrong with a frame: the field whose value cannot be. */
enum frame_field {
    FRAME_FIELD_NONE = 0,
    FRAME_FIELD_MAGIC = 1,
    FRAME_FIELD_KIND = 2,
    FRAME_FIELD_FLAGS = 3,
    FRAME_FIELD_REGION = 4,
    FRAME_FIELD_PAGE_INDEX = 5,
    FRAME_FIELD_OFFSET = 6,
    FRAME_FIELD_LENGTH = 7,
};

struct frame_verdict {
    enum frame_field field; /* FRAME_FIELD_NONE: the frame is good */
    uint64_t expected;      /* a bound or a value, as PROTOCOL.md says for the field */
    uint64_t got;
};

/* Check a header as far as it can be without knowing the regions. accepts is a bit mask of 1 << frame_kind. */
static inline struct frame_verdict frame_check(const struct frame_header *frame, uint32_t accepts, uint32_t region_count)
{
    if (frame->magic != FRAME_MAGIC)
        return (struct frame_verdict){FRAME_FIELD_MAGIC, FRAME_MAGIC, frame->magic};
    if (frame->kind >= 32 || !(accepts & (1u << frame->kind)))
        return (struct frame_verdict){FRAME_FIELD_KIND, accepts, frame->kind};
    if (frame->flags != 0)
        return (struct frame_verdict){FRAME_FIELD_FLAGS, 0, frame->flags};
    if (frame->region >= region_count)
        return (struct frame_verdict){FRAME_FIELD_REGION, region_count, frame->region};
    if (frame->offset_bytes != 0)
        return (struct frame_verdict){FRAME_FIELD_OFFSET, 0, frame->offset_bytes};
    return (struct frame_verdict){FRAME_FIELD_NONE, 0, 0};
}

/* A mark stands for the whole connection: it names no page. */
static inline struct frame_verdict frame_check_mark(const struct frame_header *frame)
{
    if (frame->region != 0)
        return (struct frame_verdict){FRAME_FIELD_REGION, 0, frame->region};
    if (frame->page_index != 0)
        return (struct frame_verdict){FRAME_FIELD_PAGE_INDEX, 0, frame->page_index};
    if (frame->length_bytes != 0)
        return (struct frame_verdict){FRAME_FIELD_LENGTH, 0, frame->length_bytes};
    return (struct frame_verdict){FRAME_FIELD_NONE, 0, 0};
}

/* Check the part that depends on the region: whole pages, inside it. */
static inline struct frame_verdict frame_check_range(const struct frame_header *frame, uint64_t page_count, uint64_t page_bytes)
{
    if (frame->page_index >= page_count)
        return (struct frame_verdict){FRAME_FIELD_PAGE_INDEX, page_count, frame->page_index};
    if (frame->length_bytes == 0 || frame->length_bytes > FRAME_LENGTH_BYTES_MAX || frame->length_bytes % page_bytes != 0)
        return (struct frame_verdict){FRAME_FIELD_LENGTH, page_bytes, frame->length_bytes};
    if (frame->length_bytes / page_bytes > page_count - frame->page_index)
        return (struct frame_verdict){FRAME_FIELD_LENGTH, (page_count - frame->page_index) * page_bytes, frame->length_bytes};
    return (struct frame_verdict){FRAME_FIELD_NONE, 0, 0};
}

#endif
