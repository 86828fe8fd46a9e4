/* The way of a page at the destination, once its bytes are here: claim it, bring it into place, PRESENT, CONTINUE.
 *
 * P1: a page is written only under its claim, and PRESENT is stored (release) before the CONTINUE is issued.
 * P3: nothing is unregistered before every page is final, which destination_finish checks page by page.
 * A claim is never held across a wait for the network: only whole pages come here (inbox.c), chunks of larger ones to claims.c.
 * Runs of 4 KiB pages are claimed and mapped up to 64 at a time, as CONTINUE of a range costs 250 ns a page and 544 alone.
 * While faults come the source sends runs of 16 (stream.c), so a fault on a claimed page waits tens of microseconds. */
#include "destination.h"

#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "resolve.h"
#include "result.h"

#define RUN_BYTES (256u << 10)
#define FINISH_TURNS 10000 /* milliseconds each at most: a guest must not hold its daemon's thread for ever */

struct destination *destination_create(const struct memory_region *regions, uint32_t region_count, int userfaultfd, int *error_number)
{
    struct destination *destination = calloc(1, sizeof(*destination));
    if (!destination) {
        *error_number = ENOMEM;
        return NULL;
    }
    destination->userfaultfd = userfaultfd;
    destination->states_fd = -1;
    destination->streams = 1;
    atomic_init(&destination->map_steer, STEER_NONE);
    atomic_init(&destination->bulk_next, STEER_NONE);
    destination->stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    destination->final_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    destination->marked_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    destination->open_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    destination->judged_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    destination->foreseen_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    bool descriptors = destination->stop_fd >= 0 && destination->final_fd >= 0 && destination->marked_fd >= 0 &&
                       destination->open_fd >= 0 && destination->judged_fd >= 0 && destination->foreseen_fd >= 0;
    *error_number = descriptors ? memory_init(&destination->memory, regions, region_count) : errno;
    if (*error_number == 0)
        *error_number = memory_map_aliases(&destination->memory);
    if (*error_number == 0) {
        destination->copies = calloc(destination->memory.page_total, sizeof(*destination->copies));
        *error_number = destination->copies ? claims_init(&destination->claims, &destination->memory) : ENOMEM;
    }
    if (*error_number == 0)
        *error_number = states_init(destination);
    if (*error_number == 0)
        return destination;
    destination_destroy(destination);
    return NULL;
}

void destination_destroy(struct destination *destination)
{
    states_deinit(destination);
    memory_deinit(&destination->memory);
    int descriptors[] = {destination->stop_fd, destination->final_fd,  destination->marked_fd,
                         destination->open_fd, destination->judged_fd, destination->foreseen_fd};
    for (size_t i = 0; i < sizeof(descriptors) / sizeof(descriptors[0]); i++)
        if (descriptors[i] >= 0)
            close(descriptors[i]);
    free((void *)destination->copies);
    claims_deinit(&destination->claims);
    free(destination);
}

void destination_poll(struct destination *destination, uint64_t poll_ns)
{
    destination->poll_ns = poll_ns;
}

void destination_streams(struct destination *destination, uint32_t streams)
{
    destination->streams = streams;
}

void destination_stop(struct destination *destination)
{
    eventfd_write(destination->stop_fd, 1);
}

int destination_final_fd(const struct destination *destination)
{
    return destination->final_fd;
}

int destination_marked_fd(const struct destination *destination)
{
    return destination->marked_fd;
}

void destination_open(struct destination *destination)
{
    atomic_store_explicit(&destination->opened, true, memory_order_release);
    eventfd_write(destination->open_fd, 1);
}

void destination_foresee(struct destination *destination, const uint64_t *pages, uint32_t page_count)
{
    for (uint32_t i = 0; i < page_count && destination->foreseen_count < FORESEEN_MAX; i++)
        if (pages[i] < destination->memory.page_total)
            destination->foreseen[destination->foreseen_count++] = pages[i];
    eventfd_write(destination->foreseen_fd, 1);
}

void destination_end_wait(struct destination *destination, uint64_t page, enum fault_kind kind)
{
    uint64_t since_ns;
    if (waiting_take(&destination->waiting, page, &since_ns))
        histogram_record(&destination->latency[kind], clock_monotonic_ns() - since_ns);
}

void destination_became_final(struct destination *destination, uint64_t page_count)
{
    if (page_count == 0)
        return;
    uint64_t before = atomic_fetch_add_explicit(&destination->pages_final, page_count, memory_order_acq_rel);
    if (before + page_count == destination->memory.page_total)
        eventfd_write(destination->final_fd, 1);
}

bool destination_refuse_copy(const struct destination *destination, const struct region *region, uint64_t page_index,
                             enum loop_reason reason, struct loop_result *result)
{
    result_fail(result, reason, 0, "frame");
    result->region = (uint32_t)(region - destination->memory.regions);
    result->page_index = page_index;
    return false;
}

/* One page has come by this path: is that allowed, and is it the first time? */
static bool note_copy(struct destination *destination, const struct region *region, uint64_t page_index, enum page_path path,
                      struct loop_result *result)
{
    _Atomic uint8_t *copies = &destination->copies[region->first_page + page_index];
    bool allowed;
    if (path != PATH_URGENT) {
        uint8_t once = path == PATH_BULK ? COPY_BULK : COPY_AHEAD;
        allowed = !(atomic_fetch_or_explicit(copies, once, memory_order_relaxed) & once);
    } else {
        allowed = atomic_fetch_and_explicit(copies, (uint8_t)~COPY_ASKED, memory_order_relaxed) & COPY_ASKED;
        if (allowed)
            atomic_fetch_sub_explicit(&destination->requests_outstanding, 1, memory_order_relaxed);
    }
    return allowed ||
           destination_refuse_copy(destination, region, page_index, path == PATH_URGENT ? LOOP_PAGE_UNASKED : LOOP_PAGE_DUPLICATE, result);
}

/* Not now: the guest's own thread has to go on first. Whoever waits comes back with another fault, behind the events. */
static bool wake_again(const struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count)
{
    resolve_wake(destination->userfaultfd, region, page_index, page_count);
    return true;
}

/* A run that goes on at this page has come: faults right behind it may wait for bulk (patience.h). */
static void note_next(struct destination *destination, enum page_path path, uint64_t page)
{
    if (path == PATH_BULK)
        atomic_store_explicit(&destination->bulk_next, page, memory_order_relaxed);
}

void destination_count_dropped(struct destination *destination, enum page_path path)
{
    count(&destination->pages_dropped, 1);
    if (path == PATH_AHEAD)
        count(&destination->pages_readahead_dropped, 1);
}

static bool resolution_failed(const struct resolution *resolution, const char *where, struct loop_result *result)
{
    if (resolution->outcome == RESOLVE_GONE)
        return result_fail(result, LOOP_GUEST_GONE, resolution->error_number, where);
    return result_fail(result, LOOP_USERFAULTFD_FAILED, resolution->error_number, where);
}

bool destination_map_zero(struct destination *destination, const struct region *region, uint64_t page_index, struct loop_result *result)
{
    struct resolution resolution = resolve_zero(destination->userfaultfd, region, page_index);
    if (resolution.outcome == RESOLVE_CHANGING)
        return wake_again(destination, region, page_index, 1);
    if (resolution.outcome != RESOLVE_MAPPED && resolution.outcome != RESOLVE_ALREADY)
        return resolution_failed(&resolution, "zero page", result);
    count(&destination->wakes, resolution.wakes);
    page_mapped(&destination->state[region->first_page + page_index], PAGE_ZERO);
    page_mapped(&destination->state[region->first_page + page_index], PAGE_REMOVED);
    return true;
}

bool destination_map_present(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                             struct loop_result *result)
{
    while (page_count > 0) {
        struct resolution resolution = resolve_continue(destination->userfaultfd, region, page_index, page_count);
        count(&destination->wakes, resolution.wakes);
        for (uint64_t i = 0; i < resolution.pages_done; i++)
            page_mapped(&destination->state[region->first_page + page_index + i], PAGE_PRESENT);
        page_index += resolution.pages_done;
        page_count -= resolution.pages_done;
        if (page_count == 0)
            return true;
        if (resolution.outcome == RESOLVE_CHANGING)
            return wake_again(destination, region, page_index, page_count);
        if (resolution.outcome != RESOLVE_HOLE)
            return resolution_failed(&resolution, "UFFDIO_CONTINUE", result);
        /* A hole where content was placed: the guest has discarded it since; what it then reads is zero. */
        resolution = resolve_zero(destination->userfaultfd, region, page_index);
        if (resolution.outcome == RESOLVE_CHANGING)
            return wake_again(destination, region, page_index, page_count);
        if (resolution.outcome != RESOLVE_MAPPED && resolution.outcome != RESOLVE_ALREADY)
            return resolution_failed(&resolution, "zero page", result);
        page_mapped(&destination->state[region->first_page + page_index], PAGE_PRESENT);
        page_index++;
        page_count--;
    }
    return true;
}

/* Of a run that was claimed: what is present is mapped, in runs; what was discarded meanwhile is cleared, and still ours until it is left. */
static bool map_or_remove(struct destination *destination, const struct region *region, uint64_t first, uint64_t page_count, uint64_t present,
                          struct loop_result *result)
{
    for (uint64_t i = 0, run_pages; i < page_count; i += run_pages) {
        run_pages = 1;
        if (present >> i & 1) {
            while (i + run_pages < page_count && (present >> (i + run_pages) & 1))
                run_pages++;
            if (!destination_map_present(destination, region, first + i, run_pages, result))
                return false;
            continue;
        }
        int error_number = place_hole(region, first + i, 1);
        if (error_number != 0)
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "clear");
        if (!destination_leave_removed(destination, region, first + i, result))
            return false;
    }
    return true;
}

/* Pages [first, first + count) are claimed by us: write, publish, map. */
static bool place_claimed(struct destination *destination, const struct region *region, uint64_t first, uint64_t page_count,
                          const char *bytes, enum page_path path, struct loop_result *result)
{
    page_byte *state = &destination->state[region->first_page];
    int error_number = place_pages(region, first, page_count, bytes, path);
    if (error_number != 0) {
        for (uint64_t i = first; i < first + page_count; i++)
            page_leave_receiving(&state[i], PAGE_ABSENT);
        return result_fail(result, LOOP_MEMORY_FAILED, error_number, "place");
    }
    events_applied(destination);
    uint64_t wanted = 0, present = 0; /* bit i: page first + i; a run has at most 64 pages */
    for (uint64_t i = 0; i < page_count; i++) {
        bool waits = false;
        present |= (uint64_t)page_publish(&state[first + i], &waits) << i;
        wanted |= (uint64_t)waits << i;
    }
    if (!map_or_remove(destination, region, first, page_count, present, result))
        return false;
    for (; wanted != 0; wanted &= wanted - 1)
        destination_end_wait(destination, region->first_page + first + (uint64_t)__builtin_ctzll(wanted), FAULT_REMOTE);
    _Atomic uint64_t *pages_placed[] = {&destination->pages_urgent, &destination->pages_bulk, &destination->pages_readahead};
    uint64_t placed = (uint64_t)__builtin_popcountll(present);
    count(pages_placed[path], placed);
    destination_became_final(destination, placed);
    return true;
}

bool destination_take_pages(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                            const char *bytes, enum page_path path, struct loop_result *result)
{
    page_byte *state = &destination->state[region->first_page];
    uint64_t page_bytes = region->memory.page_bytes;
    uint64_t run_pages_max = page_bytes < RUN_BYTES ? RUN_BYTES / page_bytes : 1;
    uint64_t end = page_index + page_count;
    while (page_index < end) {
        uint64_t run_pages = 0;
        while (page_index + run_pages < end && run_pages < run_pages_max) {
            if (!note_copy(destination, region, page_index + run_pages, path, result))
                break;
            if (!page_claim(&state[page_index + run_pages])) {
                destination_count_dropped(destination, path);
                break;
            }
            run_pages++;
        }
        note_next(destination, path, region->first_page + page_index + run_pages);
        if (run_pages > 0 && !place_claimed(destination, region, page_index, run_pages, bytes, path, result))
            return false;
        if (result->reason == LOOP_PAGE_UNASKED || result->reason == LOOP_PAGE_DUPLICATE)
            return false;
        /* A run that stopped early stopped at a page that was dropped. */
        bool dropped = run_pages < run_pages_max && page_index + run_pages < end;
        page_index += run_pages + dropped;
        bytes += (run_pages + dropped) * page_bytes;
    }
    return true;
}

int destination_clear_old(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count)
{
    _Atomic uint8_t *copies = &destination->copies[region->first_page];
    for (uint64_t end = page_index + page_count; page_index < end;) {
        uint64_t run_pages = 0;
        while (page_index + run_pages < end &&
               atomic_load_explicit(&copies[page_index + run_pages], memory_order_relaxed) & COPY_IN_FILE)
            run_pages++;
        int error_number = run_pages > 0 ? place_zeroes(region, page_index, run_pages) : 0;
        if (error_number != 0)
            return error_number;
        for (uint64_t i = 0; i < run_pages; i++)
            atomic_fetch_and_explicit(&copies[page_index + i], (uint8_t)~COPY_IN_FILE, memory_order_relaxed);
        page_index += run_pages > 0 ? run_pages : 1;
    }
    return 0;
}

bool destination_take_zeroes(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                             enum page_path path, struct loop_result *result)
{
    page_byte *state = &destination->state[region->first_page];
    note_next(destination, path, region->first_page + page_index + page_count);
    for (uint64_t i = page_index; i < page_index + page_count; i++) {
        if (!note_copy(destination, region, i, path, result))
            return false;
        if (!page_claim(&state[i])) {
            destination_count_dropped(destination, path);
            continue;
        }
        int error_number = destination_clear_old(destination, region, i, 1);
        if (error_number != 0) {
            page_leave_receiving(&state[i], PAGE_ABSENT);
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "clear");
        }
        if (page_leave_receiving(&state[i], PAGE_ZERO)) {
            if (!destination_map_zero(destination, region, i, result))
                return false;
            destination_end_wait(destination, region->first_page + i, FAULT_REMOTE);
        }
        count(&destination->pages_zero, 1);
        destination_became_final(destination, 1);
    }
    return true;
}

static bool is_final(uint8_t state)
{
    return state == PAGE_PRESENT || state == PAGE_MAPPED || state == PAGE_ZERO || state == PAGE_REMOVED;
}

/* The fault loop has ended: events that keep the page from being mapped are read here. All is final, so they change nothing. */
static bool map_at_last(struct destination *destination, const struct region *region, uint64_t page_index, struct loop_result *result)
{
    for (uint32_t turn = 0; turn < FINISH_TURNS; turn++) {
        if (!destination_map_present(destination, region, page_index, 1, result))
            return false;
        if (page_load(&destination->state[region->first_page + page_index]) != PAGE_PRESENT)
            return true;
        events_drain(destination);
    }
    return result_fail(result, LOOP_USERFAULTFD_FAILED, EAGAIN, "UFFDIO_CONTINUE");
}

void destination_finish(struct destination *destination, struct loop_result *result)
{
    result_reset(result);
    for (uint32_t r = 0; r < destination->memory.region_count; r++) {
        const struct region *region = &destination->memory.regions[r];
        for (uint64_t i = 0; i < region->page_count; i++) {
            uint8_t state = page_load(&destination->state[region->first_page + i]);
            if (!is_final(state)) {
                result_fail(result, LOOP_INCOMPLETE, 0, "finish");
                result->region = r;
                result->page_index = i;
                result->got = state;
                return;
            }
            if (state == PAGE_PRESENT && !map_at_last(destination, region, i, result))
                return;
        }
    }
    for (uint32_t r = 0; r < destination->memory.region_count; r++) {
        int error_number = resolve_unregister(destination->userfaultfd, &destination->memory.regions[r]);
        if (error_number != 0) {
            result_fail(result, error_number == ENOENT || error_number == ESRCH ? LOOP_GUEST_GONE : LOOP_USERFAULTFD_FAILED, error_number,
                        "UFFDIO_UNREGISTER");
            return;
        }
    }
    events_drain(destination); /* whose discards wait to be read: nobody else will */
    result->reason = LOOP_FINISHED;
}

void destination_read(const struct destination *destination, struct destination_figures *figures)
{
#define X(name) figures->name = atomic_load_explicit(&destination->name, memory_order_relaxed);
    DESTINATION_COUNTERS(X)
#undef X
    figures->pages_total = destination->memory.page_total;
}

void destination_latency(const struct destination *destination, uint32_t fault_kind, struct histogram_copy *copy)
{
    histogram_read(&destination->latency[fault_kind < FAULT_KINDS ? fault_kind : FAULT_REMOTE], copy);
}
