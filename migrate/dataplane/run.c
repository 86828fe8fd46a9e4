/* One run of pages, or of chunks of a large page, out of the guest's memory and onto a connection: read, zero ones told from others,
 * sent. Whatever the size of pages, a run is no longer than the buffer. */
#include <errno.h>
#include <stdlib.h>

#include "result.h"
#include "source.h"

#define URGENT_BYTES FRAME_CHUNK_BYTES /* the destination places one piece while the next is on its way */
#define LOOK_BYTES 4096u /* of a chunk, before all of it */
#define RUN_BYTES (1u << 20) /* fewest wake-ups a byte: 256 KiB runs reach 0.88 of its rate, 64 KiB ones 0.75 */

int run_sender_init(struct run_sender *sender, struct source *source, int socket, enum run_path path)
{
    *sender = (struct run_sender){.source = source, .channel = channel_of(socket), .buffer_bytes = RUN_BYTES, .path = path};
    if (path == RUN_URGENT)
        sender->buffer_bytes = URGENT_BYTES;
    sender->buffer = malloc(sender->buffer_bytes);
    return sender->buffer ? 0 : ENOMEM;
}

void run_sender_deinit(struct run_sender *sender)
{
    paced_leave(&sender->source->paced, &sender->link, &sender->channel);
    free(sender->buffer);
}

const struct region *region_of_page(const struct source *source, uint64_t page)
{
    return memory_at_page(&source->memory, page);
}

static void count_pages(const struct run_sender *sender, bool zero, uint64_t page_count)
{
    struct source *source = sender->source;
    _Atomic uint64_t *const counter[][2] = {
        [RUN_BULK] = {&source->pages_bulk, &source->pages_zero_bulk},
        [RUN_PRECOPY] = {&source->pages_precopy, &source->pages_zero_precopy},
        [RUN_AHEAD] = {&source->pages_readahead, &source->pages_zero_readahead},
        [RUN_URGENT] = {&source->pages_urgent, &source->pages_zero_urgent},
    };
    count(counter[sender->path][zero], page_count);
}

static void count_bytes(const struct run_sender *sender, uint64_t sent_bytes)
{
    struct source *source = sender->source;
    if (sender->path == RUN_AHEAD)
        count(&source->bytes_readahead, sent_bytes);
    _Atomic uint64_t *const counter[] = {
        [RUN_BULK] = &source->bytes_bulk,
        [RUN_PRECOPY] = &source->bytes_precopy,
        [RUN_AHEAD] = &source->bytes_urgent,
        [RUN_URGENT] = &source->bytes_urgent,
    };
    count(counter[sender->path], sent_bytes);
}

static enum frame_kind kind_of(const struct run_sender *sender, bool zero)
{
    if (sender->path == RUN_AHEAD)
        return zero ? FRAME_AHEAD_ZERO : FRAME_AHEAD;
    return zero ? FRAME_ZERO : FRAME_PAGES;
}

/* What somebody waits for, or (ahead of a reader) is about to, is never paced. */
static bool send_pieces(struct run_sender *sender, struct iovec *pieces, int piece_count, struct loop_result *result)
{
    struct source *source = sender->source;
    if (sender->path == RUN_AHEAD || sender->path == RUN_URGENT)
        return channel_send_all(&sender->channel, pieces, piece_count, source->stop_fd, result);
    return paced_send(&source->paced, &sender->link, &sender->channel, pieces, piece_count, source->stop_fd, result);
}

/* One frame: its header, and its bytes unless they are zero (NULL). */
static bool send_piece(struct run_sender *sender, struct frame_header *header, const char *bytes, struct loop_result *result)
{
    struct iovec pieces[2] = {{header, FRAME_HEADER_BYTES}, {(void *)(uintptr_t)bytes, bytes ? header->length_bytes : 0}};
    count_bytes(sender, FRAME_HEADER_BYTES + pieces[1].iov_len);
    if (send_pieces(sender, pieces, bytes ? 2 : 1, result))
        return true;
    if (result->error_number == EFAULT) /* the guest has truncated its file, or there is no huge page for a hole that it has just made */
        result->reason = LOOP_MEMORY_FAILED;
    return false;
}

/* Where the content of these units is: in the buffer, read into it, or where the kernel alone touches it (memory_map_large). */
static const char *content_of(const struct run_sender *sender, const struct region *region, uint64_t start_bytes, uint64_t size_bytes,
                              struct loop_result *result)
{
    if (region->alias)
        return region->alias + start_bytes;
    return source_read_bytes(region, start_bytes, size_bytes, sender->buffer, result) ? sender->buffer : NULL;
}

/* Most units that are not zero show it soon. */
static bool is_zero(const struct run_sender *sender, const struct region *region, uint64_t start_bytes, const char *content, bool *zero,
                    struct loop_result *result)
{
    uint64_t unit_bytes = region_unit_bytes(region);
    if (!region->alias) {
        *zero = page_is_zero(content, unit_bytes);
        return true;
    }
    *zero = true;
    for (uint64_t done_bytes = 0, look_bytes = LOOK_BYTES; *zero && done_bytes < unit_bytes; done_bytes += look_bytes) {
        look_bytes = done_bytes == 0 ? LOOK_BYTES : unit_bytes - done_bytes;
        if (!source_read_bytes(region, start_bytes + done_bytes, look_bytes, sender->buffer, result))
            return false;
        *zero = page_is_zero(sender->buffer, look_bytes);
    }
    return true;
}

/* Read so many pages, or chunks, from a byte of the region on, and send them in runs that are alike. *filled: those with content. */
static bool send_units(struct run_sender *sender, const struct region *region, uint64_t start_bytes, uint64_t unit_count, uint64_t *filled,
                       struct loop_result *result)
{
    uint64_t unit_bytes = region_unit_bytes(region);
    const char *content = content_of(sender, region, start_bytes, unit_count * unit_bytes, result);
    bool zero, next_zero = false;
    *filled = 0;
    if (!content || !is_zero(sender, region, start_bytes, content, &next_zero, result))
        return false;
    for (uint64_t done = 0, alike; done < unit_count; done += alike) {
        zero = next_zero;
        for (alike = 1; done + alike < unit_count && next_zero == zero; alike += next_zero == zero) {
            uint64_t ahead_bytes = (done + alike) * unit_bytes;
            if (!is_zero(sender, region, start_bytes + ahead_bytes, content + ahead_bytes, &next_zero, result))
                return false;
        }
        struct frame_header header =
            frame_of_bytes(sender->source, kind_of(sender, zero), region, start_bytes + done * unit_bytes, alike * unit_bytes);
        if (!send_piece(sender, &header, zero ? NULL : content + done * unit_bytes, result))
            return false;
        *filled += zero ? 0 : alike;
    }
    return true;
}

bool run_send(struct run_sender *sender, const struct region *region, uint64_t page_index, uint64_t page_count, struct loop_result *result)
{
    uint64_t filled;
    bool sent = send_units(sender, region, page_index * region->memory.page_bytes, page_count, &filled, result);
    count_pages(sender, false, filled);
    count_pages(sender, true, sent ? page_count - filled : 0);
    return sent;
}

bool run_send_piece(struct run_sender *sender, const struct region *region, uint64_t page_index, uint64_t *chunk, struct loop_result *result)
{
    struct source *source = sender->source;
    uint64_t run_chunks = source_mark_chunks(source, region, page_index, chunk, sender->buffer_bytes / FRAME_CHUNK_BYTES), filled;
    if (run_chunks == 0)
        return true;
    uint64_t start_bytes = page_index * region->memory.page_bytes + *chunk * FRAME_CHUNK_BYTES;
    if (!send_units(sender, region, start_bytes, run_chunks, &filled, result))
        return false;
    *chunk += run_chunks;
    bool zero;
    if (source_chunks_sent(source, region, page_index, run_chunks, filled, &zero))
        count_pages(sender, zero, 1);
    return true;
}

bool run_send_all(struct run_sender *sender, const struct region *region, uint64_t page_index, struct loop_result *result)
{
    uint64_t page_bytes = region->memory.page_bytes, total = 0;
    for (uint64_t done_bytes = 0, run_bytes; done_bytes < page_bytes; done_bytes += run_bytes) {
        run_bytes = page_bytes - done_bytes < sender->buffer_bytes ? page_bytes - done_bytes : sender->buffer_bytes;
        uint64_t filled;
        if (!send_units(sender, region, page_index * page_bytes + done_bytes, run_bytes / FRAME_CHUNK_BYTES, &filled, result))
            return false;
        total += filled;
    }
    count_pages(sender, total == 0, 1);
    return true;
}
