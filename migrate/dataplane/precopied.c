/* See precopied.h.
 *
 * P1: a round's page is written under its claim as every page is; over one connection its copies come in order.
 * P2: what is held is in the page cache and nobody's: a fault that finds it asks the source. The stale set, which the source
 * makes once the guest is paused for good, turns each held page into a final or a lacking one, and no other.
 * A page that becomes zero in a later round still has its old bytes in the file: they go before the state says zero. */
#include "precopied.h"

#include <poll.h>
#include <stdlib.h>

#include "resolve.h"
#include "result.h"
#include "verdict.h"

#define RUN_PAGES_MAX 64
#define CHUNK_PAGES 512u /* mapped in about 130 us */

/* Claim up to RUN_PAGES_MAX pages from page_index on; counts those that were not held before. */
static uint64_t claim_run(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count)
{
    uint64_t run_pages = 0, newly = 0;
    uint8_t before;
    while (run_pages < page_count && run_pages < RUN_PAGES_MAX &&
           page_claim_precopy(&destination->state[region->first_page + page_index + run_pages], &before)) {
        newly += before == PAGE_ABSENT;
        run_pages++;
    }
    count(&destination->pages_held, newly);
    return run_pages;
}

/* A waiting guest may touch its memory (a loader, say): who waits for a page of this run faults anew and finds it held. */
static void leave_run(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t run_pages,
                      enum page_state state)
{
    for (uint64_t i = page_index; i < page_index + run_pages; i++)
        if (page_leave_receiving(&destination->state[region->first_page + i], state))
            resolve_wake(destination->userfaultfd, region, i, 1);
}

bool precopy_hold_pages(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                        const char *bytes, struct loop_result *result)
{
    for (uint64_t end = page_index + page_count, run_pages; page_index < end; page_index += run_pages) {
        uint64_t page = region->first_page + page_index;
        run_pages = claim_run(destination, region, page_index, end - page_index);
        for (uint64_t i = 0; i < run_pages; i++) /* before any byte is there: a clean-up must find it */
            atomic_fetch_or_explicit(&destination->copies[page + i], COPY_IN_FILE, memory_order_relaxed);
        int error_number = run_pages > 0 ? place_pages(region, page_index, run_pages, bytes, PATH_BULK) : 0;
        leave_run(destination, region, page_index, run_pages, error_number == 0 ? PAGE_HELD : PAGE_ABSENT);
        if (error_number != 0)
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "place");
        count(run_pages > 0 ? &destination->pages_precopy : &destination->pages_dropped, run_pages > 0 ? run_pages : 1);
        run_pages += run_pages == 0; /* a waiting guest that touches its memory has asked for this one: it comes when it is final */
        bytes += run_pages * region->memory.page_bytes;
    }
    return true;
}

bool precopy_hold_zeroes(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                         struct loop_result *result)
{
    for (uint64_t end = page_index + page_count, run_pages; page_index < end; page_index += run_pages) {
        run_pages = claim_run(destination, region, page_index, end - page_index);
        int error_number = destination_clear_old(destination, region, page_index, run_pages);
        leave_run(destination, region, page_index, run_pages, error_number == 0 ? PAGE_HELD_ZERO : PAGE_ABSENT);
        if (error_number != 0)
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "clear");
        count(run_pages > 0 ? &destination->pages_precopy : &destination->pages_dropped, run_pages > 0 ? run_pages : 1);
        run_pages += run_pages == 0;
    }
    return true;
}

void settle_judge(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                  const uint8_t *stale)
{
    page_byte *state = &destination->state[region->first_page + page_index];
    uint64_t kept = 0, zero = 0, lacking = 0;
    for (uint64_t i = 0; i < page_count; i++) {
        bool is_stale = stale[i / 8] >> i % 8 & 1;
        if (is_stale) /* before a fault can find it lacking */
            atomic_fetch_or_explicit(&destination->copies[region->first_page + page_index + i], COPY_STALE, memory_order_relaxed);
        enum page_state now = page_judge(&state[i], is_stale);
        kept += now == PAGE_PRESENT;
        zero += now == PAGE_ZERO;
        lacking += now == PAGE_ABSENT;
    }
    count(&destination->pages_kept, kept);
    count(&destination->pages_zero, zero);
    count(&destination->pages_stale, lacking);
    destination->judged_final += kept + zero;
}

static bool is_lacking(const void *of, uint64_t page)
{
    const struct destination *destination = of;
    return page_load(&destination->state[page]) == PAGE_ABSENT; /* one that is REQUESTED comes as urgent */
}

/* Pages [first, end) of a region that are here and not mapped yet, in runs. */
static bool map_runs(struct destination *destination, const struct region *region, uint64_t first, uint64_t end, struct loop_result *result)
{
    const page_byte *state = &destination->state[region->first_page];
    while (first < end) {
        uint64_t run_pages = 0;
        while (first + run_pages < end && page_load(&state[first + run_pages]) == PAGE_PRESENT)
            run_pages++;
        if (run_pages > 0 && !destination_map_present(destination, region, first, run_pages, result))
            return false;
        first += run_pages > 0 ? run_pages : 1;
    }
    return true;
}

static bool map_chunk(struct destination *destination, uint64_t chunk, struct loop_result *result)
{
    const struct memory *memory = &destination->memory;
    uint64_t first = chunk * CHUNK_PAGES, end = first + CHUNK_PAGES;
    for (uint32_t r = 0; r < memory->region_count; r++) {
        const struct region *region = &memory->regions[r];
        uint64_t from = first > region->first_page ? first - region->first_page : 0;
        uint64_t to = end > region->first_page ? end - region->first_page : 0;
        if (!map_runs(destination, region, from, to < region->page_count ? to : region->page_count, result))
            return false;
    }
    return true;
}

static bool going_on(const struct destination *destination, struct loop_result *result)
{
    struct pollfd stop = {.fd = destination->stop_fd, .events = POLLIN};
    return poll(&stop, 1, 0) <= 0 || result_fail(result, LOOP_STOPPED, 0, "map ahead"); /* EINTR is no reason to stop */
}

/* Map everything that is here before anybody touches it, a chunk at a time, each time around the last local fault if that is
 * still to do: the guest then faults about once a chunk, not once a page. */
static bool map_ahead(struct destination *destination, struct loop_result *result)
{
    uint64_t chunks = (destination->memory.page_total + CHUNK_PAGES - 1) / CHUNK_PAGES, next = 0;
    uint8_t *done = calloc(chunks, 1);
    if (!done)
        return result_fail(result, LOOP_MEMORY_FAILED, ENOMEM, "calloc");
    bool good = true;
    while (good && next < chunks && going_on(destination, result)) {
        uint64_t steer = atomic_exchange_explicit(&destination->map_steer, STEER_NONE, memory_order_relaxed) / CHUNK_PAGES;
        uint64_t chunk = steer < chunks && !done[steer] ? steer : next;
        good = map_chunk(destination, chunk, result);
        done[chunk] = 1;
        while (next < chunks && done[next])
            next++;
    }
    free(done);
    return good && next == chunks;
}

bool settle_end(struct destination *destination, struct channel *channel, struct loop_result *result)
{
    atomic_store_explicit(&destination->settled_ns, clock_monotonic_ns(), memory_order_relaxed);
    if (!verdict_send(channel, &destination->memory, FRAME_LACKS, is_lacking, destination, destination->stop_fd, result) ||
        !map_ahead(destination, result))
        return false;
    /* Counted only now: with the last final page the loops are stopped, and nobody would answer faults on what is not mapped. */
    destination_became_final(destination, destination->judged_final);
    return true;
}

void destination_clean(struct destination *destination, struct loop_result *result)
{
    result_reset(result);
    events_drain(destination); /* of what it did while it waited; who faulted is woken below */
    for (uint32_t r = 0; r < destination->memory.region_count; r++) {
        const struct region *region = &destination->memory.regions[r];
        int error_number = place_nothing(region);
        if (error_number != 0) {
            result_fail(result, LOOP_MEMORY_FAILED, error_number, "clean");
            return;
        }
        resolve_wake(destination->userfaultfd, region, 0, region->page_count);
    }
    result->reason = LOOP_FINISHED;
}
