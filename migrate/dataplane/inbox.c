/* See inbox.h.
 *
 * Bytes are received into a small buffer that stays in the cache and brought into place from there: receiving into the
 * page itself would hold its claim across a wait for the network (P1), and a first byte in the page cache turns a touch
 * into a minor fault on half a page. The extra copy costs a tenth of what allocating the page does.
 *
 * A chunk of a large page, whose memory is there already, is received where it belongs, without that copy: when the socket has all of
 * it, so that there is nothing to wait for. For that no more is received into the buffer than what is behind: the next header.
 * Otherwise it comes by the buffer, too. */
#include "inbox.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "precopied.h"
#include "result.h"

#define INBOX_BYTES_MIN (1088u << 10) /* the longest run of the stream loop, and the beginning of the next */
#define INBOX_URGENT_BYTES_MIN (64u << 10)

int inbox_init(struct inbox *inbox, const struct destination *destination, int socket, enum page_path path)
{
    /* a whole page, or chunk, and the start of the next */
    size_t wanted_bytes = 2 * ((size_t)destination->memory.unit_bytes_max + FRAME_HEADER_BYTES);
    size_t least_bytes = path == PATH_BULK ? INBOX_BYTES_MIN : INBOX_URGENT_BYTES_MIN;
    *inbox = (struct inbox){.channel = channel_of(socket), .path = path};
    inbox->capacity_bytes = wanted_bytes > least_bytes ? wanted_bytes : least_bytes;
    inbox->buffer = malloc(inbox->capacity_bytes);
    return inbox->buffer ? 0 : ENOMEM;
}

void inbox_deinit(struct inbox *inbox)
{
    free(inbox->buffer);
}

/* Unasked pages come only once the guest has been resumed here: before that they would not be final (P2). */
static uint32_t accepted(const struct inbox *inbox, const struct destination *destination)
{
    switch (inbox->phase) {
    case INBOX_PRECOPY:
        return 1u << FRAME_PAGES | 1u << FRAME_ZERO | 1u << FRAME_MARK;
    case INBOX_STALE:
        return 1u << FRAME_STALE;
    case INBOX_MARKED:
    case INBOX_FINAL:
        break;
    }
    uint32_t accepted = 1u << FRAME_PAGES | 1u << FRAME_ZERO;
    if (inbox->path == PATH_URGENT && atomic_load_explicit(&destination->opened, memory_order_acquire))
        accepted |= 1u << FRAME_AHEAD | 1u << FRAME_AHEAD_ZERO;
    return accepted;
}

static enum page_path path_of_frame(const struct inbox *inbox)
{
    return inbox->frame.kind == FRAME_AHEAD || inbox->frame.kind == FRAME_AHEAD_ZERO ? PATH_AHEAD : inbox->path;
}

static struct frame_verdict check_header(const struct inbox *inbox, const struct destination *destination)
{
    const struct memory *memory = &destination->memory;
    const struct frame_header *frame = &inbox->frame;
    struct frame_verdict verdict = frame_check(frame, accepted(inbox, destination), memory->region_count);
    if (verdict.field != FRAME_FIELD_NONE)
        return verdict;
    if (frame->kind == FRAME_MARK)
        return frame_check_mark(frame);
    const struct region *region = &memory->regions[frame->region];
    verdict = frame_check_range(frame, region->page_count, region->memory.page_bytes);
    if (verdict.field != FRAME_FIELD_NONE)
        return verdict;
    if (frame->kind == FRAME_STALE)
        return verdict_check(memory, &inbox->stale, frame);
    if (path_of_frame(inbox) == PATH_URGENT && frame->length_bytes != region->memory.page_bytes &&
        !frame_is_piece(frame, region->memory.page_bytes))
        return (struct frame_verdict){FRAME_FIELD_LENGTH, region->memory.page_bytes, frame->length_bytes};
    return verdict;
}

/* Whole pages, or chunks, of the current frame; bytes is NULL for zeroes. */
static bool take_units(struct inbox *inbox, struct destination *destination, uint64_t unit_count, const char *bytes, struct loop_result *result)
{
    const struct region *region = &destination->memory.regions[inbox->frame.region];
    bool held = inbox->phase == INBOX_PRECOPY;
    uint64_t first = inbox->next_unit;
    inbox->next_unit += unit_count;
    if (region->page_chunks > 0)
        return held ? claims_hold(destination, region, first, unit_count, bytes, result)
                    : claims_take(destination, region, first, unit_count, bytes, path_of_frame(inbox), result);
    if (bytes)
        return held ? precopy_hold_pages(destination, region, first, unit_count, bytes, result)
                    : destination_take_pages(destination, region, first, unit_count, bytes, path_of_frame(inbox), result);
    return held ? precopy_hold_zeroes(destination, region, first, unit_count, result)
                : destination_take_zeroes(destination, region, first, unit_count, path_of_frame(inbox), result);
}

/* A header is whole: check it; zeroes are taken at once, payload from now on. */
static bool begin_frame(struct inbox *inbox, struct destination *destination, struct loop_result *result)
{
    memcpy(&inbox->frame, inbox->buffer + inbox->start, FRAME_HEADER_BYTES);
    inbox->start += FRAME_HEADER_BYTES;
    const struct frame_header *frame = &inbox->frame;
    struct frame_verdict verdict = check_header(inbox, destination);
    if (verdict.field != FRAME_FIELD_NONE)
        return result_frame(result, LOOP_FRAME_INVALID, frame, verdict);
    const struct region *region = &destination->memory.regions[frame->region];
    uint64_t unit_bytes = region_unit_bytes(region), page_units = region->memory.page_bytes / unit_bytes;
    inbox->next_unit = frame->page_index * page_units + frame->offset_bytes / unit_bytes;
    if (path_of_frame(inbox) == PATH_AHEAD)
        count(&destination->bytes_readahead, FRAME_HEADER_BYTES + (frame->kind == FRAME_AHEAD ? frame->length_bytes : 0));
    switch (frame->kind) {
    case FRAME_MARK:
        inbox->phase = INBOX_MARKED;
        return true;
    case FRAME_ZERO:
    case FRAME_AHEAD_ZERO:
        return take_units(inbox, destination, frame->length_bytes / unit_bytes, NULL, result);
    case FRAME_STALE:
        inbox->payload_bytes_left = verdict_bytes(frame->length_bytes / region->memory.page_bytes);
        return true;
    default:
        inbox->payload_bytes_left = frame->length_bytes;
        return true;
    }
}

/* The bits of a stale frame, once all of them are here. */
static bool take_stale(struct inbox *inbox, struct destination *destination, size_t here_bytes, struct loop_result *result)
{
    if (here_bytes < inbox->payload_bytes_left)
        return true;
    const struct region *region = &destination->memory.regions[inbox->frame.region];
    uint64_t page_count = inbox->frame.length_bytes / region->memory.page_bytes;
    settle_judge(destination, region, inbox->frame.page_index, page_count, (const uint8_t *)inbox->buffer + inbox->start);
    inbox->start += inbox->payload_bytes_left;
    inbox->payload_bytes_left = 0;
    verdict_step(&destination->memory, &inbox->stale, page_count);
    if (inbox->stale.region < destination->memory.region_count)
        return true;
    inbox->phase = INBOX_FINAL;
    return settle_end(destination, &inbox->channel, result);
}

/* Take the whole pages, or chunks, of the current frame that are in the buffer. */
static bool take_payload(struct inbox *inbox, struct destination *destination, struct loop_result *result)
{
    const struct region *region = &destination->memory.regions[inbox->frame.region];
    size_t here_bytes = inbox->end - inbox->start;
    if (here_bytes > inbox->payload_bytes_left)
        here_bytes = inbox->payload_bytes_left;
    if (inbox->frame.kind == FRAME_STALE)
        return take_stale(inbox, destination, here_bytes, result);
    uint64_t unit_count = here_bytes / region_unit_bytes(region), taken_bytes = unit_count * region_unit_bytes(region);
    if (unit_count == 0)
        return true;
    if (!take_units(inbox, destination, unit_count, inbox->buffer + inbox->start, result))
        return false;
    inbox->start += taken_bytes;
    inbox->payload_bytes_left -= taken_bytes;
    return true;
}

bool inbox_take_buffered(struct inbox *inbox, struct destination *destination, struct loop_result *result)
{
    for (;;) {
        size_t start_before = inbox->start;
        if (inbox->payload_bytes_left > 0) {
            if (!take_payload(inbox, destination, result))
                return false;
        } else if (inbox->end - inbox->start >= FRAME_HEADER_BYTES) {
            if (!begin_frame(inbox, destination, result))
                return false;
        }
        if (inbox->start == start_before || inbox->phase == INBOX_MARKED)
            return true;
    }
}

static _Atomic uint64_t *bytes_counter(const struct inbox *inbox, struct destination *destination)
{
    if (inbox->path == PATH_URGENT)
        return &destination->bytes_urgent;
    return inbox->phase == INBOX_PRECOPY ? &destination->bytes_precopy : &destination->bytes_bulk;
}

/* The frame goes on with a chunk of which nothing has been received, and it can be received in place. */
static bool chunk_comes(const struct inbox *inbox, const struct destination *destination)
{
    const struct region *region = &destination->memory.regions[inbox->frame.region];
    return inbox->payload_bytes_left > 0 && inbox->frame.kind != FRAME_STALE && inbox->start == inbox->end && region->page_chunks > 0 &&
           region->is_hugetlb && !inbox->channel.tls; /* which decrypts into a buffer */
}

bool inbox_expect_chunk(struct inbox *inbox, const struct destination *destination, struct loop_result *result)
{
    return destination->memory.large_total == 0 ||
           channel_expect(&inbox->channel, chunk_comes(inbox, destination) ? FRAME_CHUNK_BYTES : 1, result);
}

bool inbox_expect_run(struct inbox *inbox, const struct destination *destination, struct loop_result *result)
{
    if (chunk_comes(inbox, destination))
        return channel_expect(&inbox->channel, FRAME_CHUNK_BYTES, result);
    size_t here_bytes = inbox->end - inbox->start;
    uint64_t whole_bytes = inbox->payload_bytes_left > 0 ? inbox->payload_bytes_left : FRAME_HEADER_BYTES;
    uint64_t wanted_bytes = whole_bytes > here_bytes ? whole_bytes - here_bytes : 1;
    size_t room_bytes = inbox->capacity_bytes - inbox->end;
    return channel_expect(&inbox->channel, wanted_bytes < room_bytes ? wanted_bytes : room_bytes, result);
}

struct chunk_in_socket {
    struct chunk_bytes from; /* the first member */
    struct inbox *inbox;
    bool received;
};

/* The chunk, and behind a frame's last one as much as there is of the next header. */
static int receive_in_place(struct chunk_bytes *from, char *into)
{
    struct chunk_in_socket *chunk = (struct chunk_in_socket *)from;
    struct inbox *inbox = chunk->inbox;
    struct iovec pieces[2] = {{into, FRAME_CHUNK_BYTES}, {inbox->buffer, FRAME_HEADER_BYTES}};
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = inbox->payload_bytes_left > FRAME_CHUNK_BYTES ? 1 : 2};
    ssize_t received_bytes = recvmsg(inbox->channel.socket, &message, MSG_DONTWAIT);
    if (received_bytes < (ssize_t)FRAME_CHUNK_BYTES) /* all of it was there, so it is the memory that is not */
        return received_bytes < 0 ? errno : EFAULT;
    inbox->end = (size_t)received_bytes - FRAME_CHUNK_BYTES;
    chunk->received = true;
    return 0;
}

/* *taken: the next chunk was in the socket as a whole, and has been received in place. */
static bool take_in_place(struct inbox *inbox, struct destination *destination, bool *taken, struct loop_result *result)
{
    int there_bytes = 0;
    *taken = false;
    if (!chunk_comes(inbox, destination) || ioctl(inbox->channel.socket, FIONREAD, &there_bytes) < 0 || there_bytes < (int)FRAME_CHUNK_BYTES)
        return true;
    struct chunk_in_socket chunk = {.from = {.fill = receive_in_place}, .inbox = inbox};
    inbox->start = inbox->end = 0;
    bool held = inbox->phase == INBOX_PRECOPY;
    const struct region *region = &destination->memory.regions[inbox->frame.region];
    if (!claims_take_one(destination, region, inbox->next_unit, &chunk.from, held, path_of_frame(inbox), result))
        return false;
    if (!chunk.received) { /* nobody needs it */
        int error_number = receive_in_place(&chunk.from, inbox->buffer + FRAME_HEADER_BYTES);
        if (error_number != 0)
            return result_fail(result, LOOP_CONNECTION_FAILED, error_number, "recv");
    }
    inbox->next_unit++;
    inbox->payload_bytes_left -= FRAME_CHUNK_BYTES;
    count(bytes_counter(inbox, destination), FRAME_CHUNK_BYTES + inbox->end);
    return *taken = true;
}

/* What comes behind the current frame stays in the socket, but for its header: perhaps it can be received in place. */
static size_t wanted_bytes(const struct inbox *inbox, const struct destination *destination)
{
    size_t room_bytes = inbox->capacity_bytes - inbox->end, here_bytes = inbox->end - inbox->start;
    if (destination->memory.large_total == 0 || inbox->channel.tls)
        return room_bytes;
    uint64_t end_bytes = inbox->payload_bytes_left + FRAME_HEADER_BYTES;
    bool large = inbox->payload_bytes_left > 0 && destination->memory.regions[inbox->frame.region].page_chunks > 0;
    if (large && inbox->frame.kind != FRAME_STALE && inbox->payload_bytes_left > FRAME_CHUNK_BYTES)
        end_bytes = FRAME_CHUNK_BYTES; /* no further than the chunk that has begun */
    uint64_t wanted_bytes = end_bytes > here_bytes ? end_bytes - here_bytes : 1;
    return wanted_bytes < room_bytes ? wanted_bytes : room_bytes;
}

bool inbox_take(struct inbox *inbox, struct destination *destination, struct loop_result *result)
{
    bool taken;
    if (!take_in_place(inbox, destination, &taken, result))
        return false;
    if (taken)
        return inbox_take_buffered(inbox, destination, result);
    ssize_t received_bytes = channel_receive(&inbox->channel, inbox->buffer + inbox->end, wanted_bytes(inbox, destination), result);
    if (received_bytes < 0)
        return false;
    inbox->end += (size_t)received_bytes;
    count(bytes_counter(inbox, destination), (uint64_t)received_bytes);
    if (!inbox_take_buffered(inbox, destination, result))
        return false;
    if (inbox->start == inbox->end) {
        inbox->start = inbox->end = 0;
    } else if (inbox->capacity_bytes - inbox->end < inbox->capacity_bytes / 2) {
        /* Less than half free behind: move the rest, at most one page or chunk, to the front. */
        memmove(inbox->buffer, inbox->buffer + inbox->start, inbox->end - inbox->start);
        inbox->end -= inbox->start;
        inbox->start = 0;
    }
    return true;
}
