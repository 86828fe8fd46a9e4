/* Precopy at the source, round by round, while the guest runs: what has been written since the last round is sent again.
 *
 * A page is armed before its pending mark is taken, and that before it is read: a write that comes after is found by the
 * next scan. Whoever calls decides when another round is worth it (migrate/precopy.py). A round sends a page once, and always
 * over the same connection (partition.h), so the copies of a page arrive in the order of the rounds. */
#include <stdlib.h>

#include "dirty.h"
#include "partition.h"
#include "result.h"
#include "schedule.h"
#include "source.h"

int source_track(struct source *source, int pagemap_fd)
{
    source->pending = malloc(source->memory.page_total);
    if (!source->pending)
        return ENOMEM;
    for (uint64_t page = 0; page < source->memory.page_total; page++)
        atomic_init(&source->pending[page], 1); /* the first round is everything */
    source->pagemap_fd = pagemap_fd;
    return 0;
}

static void end_with(struct loop_result *result, int error_number, const char *where)
{
    if (error_number != 0)
        result_fail(result, LOOP_TRACKING_FAILED, error_number, where);
    else
        result->reason = LOOP_FINISHED;
}

void precopy_check(struct source *source, int pagemap_fd, struct loop_result *result)
{
    result_reset(result);
    end_with(result, dirty_check(&source->memory, pagemap_fd), "check");
}

void precopy_arm(struct source *source, struct loop_result *result)
{
    result_reset(result);
    schedule_bulk();
    atomic_store_explicit(&source->pages_pending, source->memory.page_total, memory_order_relaxed);
    end_with(result, dirty_arm_all(&source->memory, source->pagemap_fd), "arm");
}

/* What has been discarded since it was sent: no scan finds that. */
static void count_discarded(const struct source *source, uint64_t *pages, uint64_t *bytes)
{
    for (uint32_t r = 0; r < source->memory.region_count; r++) {
        const struct region *region = &source->memory.regions[r];
        uint64_t pending = 0;
        for (uint64_t i = 0; i < region->page_count; i++)
            pending += atomic_load_explicit(&source->pending[region->first_page + i], memory_order_relaxed);
        *pages += pending;
        *bytes += pending * region->memory.page_bytes;
    }
}

void precopy_count(struct source *source, struct loop_result *result)
{
    result_reset(result);
    uint64_t pages = 0, bytes = 0;
    int error_number = dirty_count(&source->memory, source->pagemap_fd, &pages, &bytes);
    count_discarded(source, &pages, &bytes);
    if (error_number == 0)
        error_number = dirty_check(&source->memory, source->pagemap_fd);
    atomic_store_explicit(&source->pages_written, pages, memory_order_relaxed);
    atomic_store_explicit(&source->bytes_written, bytes, memory_order_relaxed);
    end_with(result, error_number, "count");
}

void precopy_collect(struct source *source, struct loop_result *result)
{
    result_reset(result);
    schedule_bulk();
    uint64_t newly = 0;
    int error_number = dirty_collect(&source->memory, source->pagemap_fd, true, source->pending, &newly);
    atomic_fetch_add_explicit(&source->pages_pending, newly, memory_order_relaxed);
    end_with(result, error_number, "collect");
}

/* Marked behind the discard, so that no round has taken the mark and read what was there before it. */
void source_discarded(struct source *source, uint32_t region, uint64_t page_index, uint64_t page_count)
{
    if (!source->pending) /* nothing has been sent */
        return;
    uint64_t first = source->memory.regions[region].first_page + page_index, newly = 0;
    for (uint64_t page = first; page < first + page_count; page++)
        newly += !atomic_exchange_explicit(&source->pending[page], 1, memory_order_relaxed);
    count(&source->pages_pending, newly);
}

/* The next pending page of ours at or behind *page, which is moved there; *end as in partition_next. False: there is none. */
static bool next_pending(const struct source *source, const struct partition *ours, uint64_t *page, uint64_t *end)
{
    for (; partition_next(ours, page, end); *page = *end)
        for (; *page < *end; (*page)++)
            if (atomic_load_explicit(&source->pending[*page], memory_order_relaxed))
                return true;
    return false;
}

static bool send_pending(struct run_sender *sender, uint64_t *page, uint64_t end, struct loop_result *result)
{
    struct source *source = sender->source;
    const struct region *region = region_of_page(source, *page);
    uint64_t page_index = *page - region->first_page, run_pages = 0;
    uint64_t run_pages_max = region->page_chunks > 0 ? 1 : sender->buffer_bytes / region->memory.page_bytes;
    while (run_pages < run_pages_max && *page + run_pages < end &&
           atomic_exchange_explicit(&source->pending[*page + run_pages], 0, memory_order_relaxed))
        run_pages++;
    atomic_fetch_sub_explicit(&source->pages_pending, run_pages, memory_order_relaxed);
    *page += run_pages;
    if (region->page_chunks > 0 && run_pages > 0)
        return run_send_all(sender, region, page_index, result);
    return run_send(sender, region, page_index, run_pages, result);
}

void precopy_send(struct source *source, int bulk_socket, uint32_t stream, struct loop_result *result)
{
    result_reset(result);
    struct run_sender sender;
    int error_number = run_sender_init(&sender, source, bulk_socket, RUN_PRECOPY);
    if (error_number != 0) {
        result_fail(result, LOOP_MEMORY_FAILED, error_number, "malloc");
        return;
    }
    thread_named("precopy");
    schedule_bulk();
    result->reason = LOOP_FINISHED;
    struct partition ours = {.memory = &source->memory, .stream = stream, .streams = source->streams};
    uint64_t page = 0, end;
    while (next_pending(source, &ours, &page, &end) && send_pending(&sender, &page, end, result))
        ;
    run_sender_deinit(&sender);
}

void precopy_end(struct source *source, int bulk_socket, struct loop_result *result)
{
    result_reset(result);
    struct channel channel = channel_of(bulk_socket);
    struct frame_header header = {.magic = FRAME_MAGIC, .kind = FRAME_MARK};
    struct iovec piece = {&header, FRAME_HEADER_BYTES};
    if (channel_send_all(&channel, &piece, 1, source->stop_fd, result))
        result->reason = LOOP_FINISHED;
}
