/* The stream loop: the bulk connection at the source. Sends every page that has not gone out yet, in runs, starting
 * behind the last fault and wrapping around; zero pages as a marker.
 *
 * A page is marked sent before it is read: the mark says who sends it by bulk. A page that was asked for meanwhile goes
 * out by both paths at worst, and the destination drops the later copy. */
#include <poll.h>
#include <stdlib.h>

#include "channel.h"
#include "result.h"
#include "schedule.h"
#include "source.h"

#define RUN_BYTES (1u << 20)         /* fewest wake-ups a byte: 256 KiB runs reach 0.88 of its rate, 64 KiB ones 0.75 */
#define RUN_BYTES_FAULTS (64u << 10) /* while faults come: what a fault may have to wait behind */
#define ROUNDS_AFTER_FAULT 16

struct stream_context {
    struct source *source;
    struct channel channel;
    char *buffer; /* one run */
    size_t buffer_bytes;
    uint64_t cursor; /* flat page */
    uint32_t rounds_of_faults; /* so many rounds more in small runs */
};

static const struct region *region_of_page(const struct source *source, uint64_t page)
{
    const struct region *region = source->memory.regions;
    while (page >= region->first_page + region->page_count)
        region++;
    return region;
}

/* The next page not sent yet at or behind the cursor, wrapping around; page_total when there is none. */
static uint64_t next_unsent(const struct source *source, uint64_t cursor)
{
    uint64_t total = source->memory.page_total;
    for (uint64_t seen = 0; seen < total; seen++, cursor++) {
        if (cursor >= total)
            cursor = 0;
        if (!atomic_load_explicit(&source->sent[cursor], memory_order_relaxed))
            return cursor;
    }
    return total;
}

/* Send [page_index, +page_count) whose bytes are at content: alternating runs of pages and of zeroes. */
static bool send_run(struct stream_context *context, const struct region *region, uint64_t page_index, uint64_t page_count,
                     char *content, struct loop_result *result)
{
    struct source *source = context->source;
    uint64_t page_bytes = region->memory.page_bytes;
    for (uint64_t done = 0; done < page_count;) {
        bool zero = page_is_zero(content + done * page_bytes, page_bytes);
        uint64_t alike = 1;
        while (done + alike < page_count && page_is_zero(content + (done + alike) * page_bytes, page_bytes) == zero)
            alike++;
        struct frame_header header = frame_of_run(source, zero ? FRAME_ZERO : FRAME_PAGES, region, page_index + done, alike);
        struct iovec pieces[2] = {{&header, FRAME_HEADER_BYTES}, {content + done * page_bytes, alike * page_bytes}};
        count(zero ? &source->pages_zero_bulk : &source->pages_bulk, alike);
        count(&source->bytes_bulk, FRAME_HEADER_BYTES + (zero ? 0 : alike * page_bytes));
        if (!channel_send_all(&context->channel, pieces, zero ? 1 : 2, source->stop_fd, result))
            return false;
        done += alike;
    }
    return true;
}

static bool stream_round(struct stream_context *context, struct loop_result *result)
{
    struct source *source = context->source;
    uint64_t steer = atomic_exchange_explicit(&source->steer, STEER_NONE, memory_order_relaxed);
    if (steer != STEER_NONE)
        context->rounds_of_faults = ROUNDS_AFTER_FAULT;
    else if (context->rounds_of_faults > 0)
        context->rounds_of_faults--;
    if (steer != STEER_NONE && steer < source->memory.page_total && steer != context->cursor) {
        context->cursor = steer;
        count(&source->steers, 1);
    }
    uint64_t page = next_unsent(source, context->cursor);
    if (page == source->memory.page_total)
        return result_fail(result, LOOP_FINISHED, 0, "stream");
    const struct region *region = region_of_page(source, page);
    uint64_t page_index = page - region->first_page;
    uint64_t run_bytes_max = context->rounds_of_faults > 0 ? RUN_BYTES_FAULTS : context->buffer_bytes;
    uint64_t run_pages_max = run_bytes_max < region->memory.page_bytes ? 1 : run_bytes_max / region->memory.page_bytes;
    uint64_t run_pages = 0;
    while (run_pages < run_pages_max && page_index + run_pages < region->page_count && source_mark_sent(source, page + run_pages))
        run_pages++;
    context->cursor = page + run_pages;
    if (run_pages == 0) /* asked for in this moment */
        return true;
    return source_read_pages(region, page_index, run_pages, context->buffer, result) &&
           send_run(context, region, page_index, run_pages, context->buffer, result);
}

void stream_loop(struct source *source, int bulk_socket, struct loop_result *result)
{
    result_reset(result);
    struct stream_context context = {.source = source, .channel = {.socket = bulk_socket}, .buffer_bytes = RUN_BYTES};
    if (source->memory.page_bytes_max > context.buffer_bytes)
        context.buffer_bytes = source->memory.page_bytes_max;
    context.buffer = malloc(context.buffer_bytes);
    if (!context.buffer) {
        result_fail(result, LOOP_MEMORY_FAILED, ENOMEM, "malloc");
        return;
    }
    thread_named("stream");
    schedule_bulk();
    if (wait_ready(source->open_bulk_fd, POLLIN, source->stop_fd, result))
        while (stream_round(&context, result))
            ;
    free(context.buffer);
}
