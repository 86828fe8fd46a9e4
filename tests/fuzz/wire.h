/* Frames out of an input: a few bytes make a header that is nearly right, and its payload comes by itself, so that inputs stay short and
 * still come behind the first check. Raw bytes are among them too.
 *
 *   op & 7 < 6   a frame: kind, region, page index, offset, length and flags, a byte each; then as much payload as it says
 *   op & 7 == 6  so many raw bytes
 *   op & 7 == 7  the same frame once more, op >> 3 bytes of it changed */
#ifndef POSTCOPY_FUZZ_WIRE_H
#define POSTCOPY_FUZZ_WIRE_H

#include <string.h>

#include "frame.h"
#include "fuzz.h"

#define WIRE_BYTES_MAX (512u << 10)

struct wire {
    uint8_t bytes[WIRE_BYTES_MAX];
    size_t size_bytes;
};

static inline void wire_put(struct wire *wire, const void *bytes, size_t size_bytes)
{
    size_t room_bytes = WIRE_BYTES_MAX - wire->size_bytes;
    size_bytes = size_bytes < room_bytes ? size_bytes : room_bytes;
    memcpy(wire->bytes + wire->size_bytes, bytes, size_bytes);
    wire->size_bytes += size_bytes;
}

static inline void wire_fill(struct wire *wire, uint8_t byte, size_t size_bytes)
{
    size_t room_bytes = WIRE_BYTES_MAX - wire->size_bytes;
    size_bytes = size_bytes < room_bytes ? size_bytes : room_bytes;
    memset(wire->bytes + wire->size_bytes, byte, size_bytes);
    wire->size_bytes += size_bytes;
}

/* 0x80: a value that no region has; else small units, of pages of 4 KiB or of chunks. */
static inline uint32_t wire_length(uint8_t byte)
{
    if (byte & 0x80)
        return byte & 1 ? UINT32_MAX - byte : (uint32_t)(byte & 0x7f) << 25;
    return (uint32_t)(byte & 0x3f) * (byte & 0x40 ? FRAME_CHUNK_BYTES : 4096u);
}

static inline void wire_frame(struct wire *wire, struct taker *taker, struct frame_header *frame)
{
    uint8_t kind = take(taker), region = take(taker), page = take(taker), offset = take(taker), length = take(taker), flags = take(taker);
    *frame = (struct frame_header){
        .magic = FRAME_MAGIC,
        .kind = kind & 0x0f,
        .flags = flags & 0x0f ? flags & 1 : 0,
        .region = region & 0x40 ? UINT32_MAX : region & 3,
        .page_index = page & 0x80 ? UINT64_MAX - (page & 0x7f) : page,
        .offset_bytes = offset & 0x80 ? offset : (uint32_t)(offset & 31) * FRAME_CHUNK_BYTES,
        .length_bytes = wire_length(length),
    };
    wire_put(wire, frame, sizeof(*frame));
    if (frame->kind == FRAME_PAGES || frame->kind == FRAME_AHEAD)
        wire_fill(wire, flags & 0x10 ? 0 : page, frame->length_bytes);
    if (frame->kind == FRAME_STALE || frame->kind == FRAME_LACKS)
        wire_fill(wire, flags, (frame->length_bytes / 4096 + 7) / 8);
}

static inline void wire_make(struct wire *wire, struct taker *taker)
{
    struct frame_header frame = {.magic = FRAME_MAGIC};
    wire->size_bytes = 0;
    while (taker->left_bytes > 0 && wire->size_bytes < WIRE_BYTES_MAX) {
        uint8_t op = take(taker);
        if ((op & 7) < 6) {
            wire_frame(wire, taker, &frame);
        } else if ((op & 7) == 6) {
            for (uint32_t left = take(taker); left > 0 && taker->left_bytes > 0; left--) {
                uint8_t byte = take(taker);
                wire_put(wire, &byte, 1);
            }
        } else {
            for (uint32_t left = op >> 3; left > 0; left--) {
                size_t at = take(taker) % sizeof(frame);
                ((uint8_t *)&frame)[at] = take(taker);
            }
            wire_put(wire, &frame, sizeof(frame));
        }
    }
}

#endif
