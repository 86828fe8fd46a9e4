/* The stream loop: a bulk connection at the source. After precopy the first one settles what the destination has (settle.c), while
 * the others wait: until they know what is lacking they have nothing to send. Then each sends what has not gone out yet, in runs,
 * wrapping around; zero pages as a marker. They begin at places of their own, and one of them, whichever comes first, goes on
 * behind a fault.
 *
 * Large pages go out in pieces (claims.h): a fault steers between two of them, and what is left of the page comes later.
 *
 * A page is marked sent before it is read: the mark says who sends it by bulk. A page that was asked for meanwhile goes
 * out by both paths at worst, and the destination drops the later copy. */
#include <poll.h>
#include <sys/eventfd.h>

#include "result.h"
#include "schedule.h"
#include "source.h"

#define SETTLE_AFTER_NS 1000000 /* behind the switchover; the first step is there after about half of that */
#define RUN_BYTES_FAULTS (64u << 10) /* while faults come: what a fault may have to wait behind */
#define ROUNDS_AFTER_FAULT 16

struct stream_context {
    struct source *source;
    struct run_sender sender;
    uint64_t cursor; /* flat page */
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

/* Has there been a fault a little while ago? Each connection's next runs count: a page asked for waits behind all of them. */
static bool faults_come(struct source *source, bool now)
{
    if (now)
        atomic_store_explicit(&source->rounds_of_faults, (int32_t)(ROUNDS_AFTER_FAULT * source->streams), memory_order_relaxed);
    else if (atomic_load_explicit(&source->rounds_of_faults, memory_order_relaxed) > 0) /* two may see the last one: below 0 is none too */
        atomic_fetch_sub_explicit(&source->rounds_of_faults, 1, memory_order_relaxed);
    return atomic_load_explicit(&source->rounds_of_faults, memory_order_relaxed) > 0;
}

static bool stream_round(struct stream_context *context, struct loop_result *result)
{
    struct source *source = context->source;
    uint64_t steer = atomic_exchange_explicit(&source->steer, STEER_NONE, memory_order_relaxed);
    bool small_runs = faults_come(source, steer != STEER_NONE);
    if (steer != STEER_NONE && steer < source->memory.page_total && steer != context->cursor) {
        context->cursor = steer;
        count(&source->steers, 1);
    }
    uint64_t page = next_unsent(source, context->cursor);
    if (page == source->memory.page_total)
        return result_fail(result, LOOP_FINISHED, 0, "stream");
    const struct region *region = region_of_page(source, page);
    uint64_t page_index = page - region->first_page;
    context->cursor = page;
    if (region->page_chunks > 0) {
        uint64_t chunk = 0;
        return run_send_piece(&context->sender, region, page_index, &chunk, result);
    }
    uint64_t run_bytes_max = small_runs ? RUN_BYTES_FAULTS : context->sender.buffer_bytes;
    uint64_t run_pages_max = run_bytes_max < region->memory.page_bytes ? 1 : run_bytes_max / region->memory.page_bytes;
    uint64_t run_pages = 0;
    while (run_pages < run_pages_max && page_index + run_pages < region->page_count && source_mark_sent(source, page + run_pages))
        run_pages++;
    context->cursor = page + run_pages;
    if (run_pages == 0) /* asked for in this moment */
        return true;
    return run_send(&context->sender, region, page_index, run_pages, result);
}

/* The exchange goes first, and the first step: where a scan that begins with them wants the same CPUs it costs the downtime 0.2 ms at
 * 256 MiB, and at 8 GiB 3 ms in every other move (a slice of the scheduler). */
static bool out_of_the_way(const struct source *source, struct loop_result *result)
{
    struct pollfd polled = {.fd = source->stop_fd, .events = POLLIN};
    struct timespec timeout = {.tv_nsec = SETTLE_AFTER_NS};
    return ppoll(&polled, 1, &timeout, NULL) <= 0 || result_fail(result, LOOP_STOPPED, 0, "ppoll");
}

/* After precopy: beside the guest's first steps at the destination, not before them. */
static bool settled(struct stream_context *context, uint32_t stream, struct loop_result *result)
{
    struct source *source = context->source;
    if (source->pagemap_fd < 0 && !source->recovering) /* it lacks everything */
        return true;
    if (stream != 0)
        return wait_ready(source->settled_fd, POLLIN, source->stop_fd, result);
    if (!wait_ready(source->open_fd, POLLIN, source->stop_fd, result) || !out_of_the_way(source, result) ||
        !source_settle(source, &context->sender.channel, result))
        return false;
    eventfd_write(source->settled_fd, 1);
    return true;
}

void stream_loop(struct source *source, int bulk_socket, uint32_t stream, struct loop_result *result)
{
    result_reset(result);
    struct stream_context context = {.source = source, .cursor = source->memory.page_total / source->streams * stream};
    int error_number = run_sender_init(&context.sender, source, bulk_socket, RUN_BULK);
    if (error_number != 0) {
        result_fail(result, LOOP_MEMORY_FAILED, error_number, "malloc");
        return;
    }
    thread_named("stream");
    schedule_bulk();
    if (settled(&context, stream, result) && wait_ready(source->open_bulk_fd, POLLIN, source->stop_fd, result)) {
        atomic_store_explicit(&source->streaming, true, memory_order_release); /* not before: what is lacking is known only now */
        while (stream_round(&context, result))
            ;
    }
    run_sender_deinit(&context.sender);
}
