/* The stream loop: the bulk connection at the source. After precopy it first settles what the destination has (settle.c).
 * Then it sends every page that has not gone out yet, in runs, starting behind the last fault and wrapping around; zero pages
 * as a marker.
 *
 * A page is marked sent before it is read: the mark says who sends it by bulk. A page that was asked for meanwhile goes
 * out by both paths at worst, and the destination drops the later copy. */
#include <poll.h>

#include "result.h"
#include "schedule.h"
#include "source.h"

#define RUN_BYTES_FAULTS (64u << 10) /* while faults come: what a fault may have to wait behind */
#define ROUNDS_AFTER_FAULT 16

struct stream_context {
    struct source *source;
    struct run_sender sender;
    uint64_t cursor; /* flat page */
    uint32_t rounds_of_faults; /* so many rounds more in small runs */
};

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
    uint64_t run_bytes_max = context->rounds_of_faults > 0 ? RUN_BYTES_FAULTS : context->sender.buffer_bytes;
    uint64_t run_pages_max = run_bytes_max < region->memory.page_bytes ? 1 : run_bytes_max / region->memory.page_bytes;
    uint64_t run_pages = 0;
    while (run_pages < run_pages_max && page_index + run_pages < region->page_count && source_mark_sent(source, page + run_pages))
        run_pages++;
    context->cursor = page + run_pages;
    if (run_pages == 0) /* asked for in this moment */
        return true;
    return run_send(&context->sender, region, page_index, run_pages, result);
}

/* After precopy: beside the guest's first steps at the destination, not before them. */
static bool settled(struct stream_context *context, struct loop_result *result)
{
    struct source *source = context->source;
    if (source->pagemap_fd < 0)
        return true;
    return wait_ready(source->open_fd, POLLIN, source->stop_fd, result) && source_settle(source, &context->sender.channel, result);
}

void stream_loop(struct source *source, int bulk_socket, struct loop_result *result)
{
    result_reset(result);
    struct stream_context context = {.source = source};
    int error_number = run_sender_init(&context.sender, source, bulk_socket, RUN_BULK);
    if (error_number != 0) {
        result_fail(result, LOOP_MEMORY_FAILED, error_number, "malloc");
        return;
    }
    thread_named("stream");
    schedule_bulk();
    if (settled(&context, result) && wait_ready(source->open_bulk_fd, POLLIN, source->stop_fd, result)) {
        atomic_store_explicit(&source->streaming, true, memory_order_release); /* not before: what is lacking is known only now */
        while (stream_round(&context, result))
            ;
    }
    run_sender_deinit(&context.sender);
}
