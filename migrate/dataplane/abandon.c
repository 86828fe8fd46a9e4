/* Pages that will never come: the operator gives their source up.
 *
 * A page that is not final is LOST: UFFDIO_POISON (Linux 6.6) leaves a marker in the guest's page table, on which a touch is SIGBUS, and
 * wakes who waits there, who finds it. It is not unregistered and the userfaultfd stays open: the marker would stay, but goes with
 * MADV_DONTNEED, and what then has no registration reads zero (P3). So the fault loop goes on, without a connection, and poisons anew;
 * it also maps what is here and was dropped from the page table since. The kernel would let CONTINUE replace a marker on shmem: LOST is a
 * state like MAPPED that nobody may claim, so nothing is brought into place there any more (pages.h).
 * tests/kernel/test_resolving.py shows the kernel's part, tests/failure/test_abandoned.py the whole.
 *
 * The page is LOST first and poisoned then: a fault between the two is poisoned by the fault loop.
 *
 * What the guest has unmapped nobody can touch: ENOENT, of a range also where it has done so with a part, and where several mappings
 * make it up; such a range is taken in halves. Not lost, then; and no sign that the guest has ended, which is ESRCH: one that ends in
 * an orderly way unmaps first, and may go at any moment of this. */
#include <errno.h>
#include <sched.h>

#include "destination.h"
#include "resolve.h"
#include "result.h"

#define TURNS_MAX 1000000u /* of yielding to who discards a page, or to the guest's own thread that changes its address space: a second or so */

static bool is_unmapped(const struct loop_result *result)
{
    return result->reason == LOOP_GUEST_GONE && result->error_number == ENOENT;
}

/* These pages are LOST: who waits there gets SIGBUS. */
static bool poison(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                   struct loop_result *result)
{
    struct resolution resolution = resolve_poison(destination->userfaultfd, region, page_index, page_count);
    uint64_t left_pages = page_count - resolution.pages_done;
    if (resolution.outcome == RESOLVE_CHANGING) { /* who waits comes back with another fault, behind the events */
        resolve_wake(destination->userfaultfd, region, page_index + resolution.pages_done, left_pages);
        return true;
    }
    if (resolution.outcome != RESOLVE_MAPPED) {
        enum loop_reason reason = resolution.outcome == RESOLVE_GONE ? LOOP_GUEST_GONE : LOOP_USERFAULTFD_FAILED;
        return result_fail(result, reason, resolution.error_number, "UFFDIO_POISON");
    }
    return true;
}

bool destination_poison_again(struct destination *destination, const struct region *region, uint64_t page_index, struct loop_result *result)
{
    if (poison(destination, region, page_index, 1, result))
        return true;
    if (!is_unmapped(result))
        return false;
    result_reset(result);
    resolve_wake(destination->userfaultfd, region, page_index, 1);
    return true;
}

/* LOST, or final already; whoever discards the page meanwhile is waited for. */
static bool decide(struct destination *destination, const struct region *region, uint64_t page_index, enum page_state *state,
                   struct loop_result *result)
{
    page_byte *page = &destination->state[region->first_page + page_index];
    bool lost_before = PAGE_STATE(page_load(page)) == PAGE_LOST;
    for (uint32_t turn = 0; (*state = page_lose(page, region->page_chunks > 0)) == PAGE_RECEIVING; turn++) {
        if (turn == TURNS_MAX)
            return result_fail(result, LOOP_USERFAULTFD_FAILED, EBUSY, "abandon");
        sched_yield();
    }
    if (*state == PAGE_LOST && !lost_before) {
        uint64_t since_ns;
        waiting_take(&destination->waiting, region->first_page + page_index, &since_ns); /* no latency: it has not been resolved */
        count(&destination->pages_lost, 1);
    }
    return true;
}

/* Who waits there, by a fault from before, finds that out by himself. */
static void settle_unmapped(struct destination *destination, const struct region *region, uint64_t page_index)
{
    if (page_find(&destination->state[region->first_page + page_index]))
        atomic_fetch_sub_explicit(&destination->pages_lost, 1, memory_order_relaxed);
    resolve_wake(destination->userfaultfd, region, page_index, 1);
}

static bool settle_run(struct destination *destination, const struct region *region, uint64_t first, uint64_t page_count,
                       enum page_state state, struct loop_result *result)
{
    if (state != PAGE_LOST && state != PAGE_PRESENT)
        return true;
    for (uint64_t step = page_count; page_count > 0;) {
        uint64_t pages = step < page_count ? step : page_count;
        bool good = state == PAGE_LOST ? poison(destination, region, first, pages, result)
                                       : destination_map_present(destination, region, first, pages, result);
        if (!good && !is_unmapped(result))
            return false;
        if (!good) {
            result_reset(result);
            step = pages / 2;
            if (step > 0)
                continue; /* what has been done of it already does no harm */
            settle_unmapped(destination, region, first);
        }
        first += pages;
        page_count -= pages;
        step = good ? pages * 2 : 1;
    }
    return true;
}

static bool abandon_region(struct destination *destination, const struct region *region, struct loop_result *result)
{
    uint64_t first = 0;
    enum page_state run_state = PAGE_ABSENT;
    for (uint64_t i = 0; i < region->page_count; i++) {
        enum page_state state;
        if (!decide(destination, region, i, &state, result))
            return false;
        if (state == run_state)
            continue;
        if (!settle_run(destination, region, first, i - first, run_state, result))
            return false;
        first = i;
        run_state = state;
    }
    return settle_run(destination, region, first, region->page_count - first, run_state, result);
}

bool destination_can_abandon(const struct destination *destination)
{
    return resolve_can_poison(destination->userfaultfd);
}

void destination_abandon(struct destination *destination, struct loop_result *result)
{
    result_reset(result);
    for (uint32_t r = 0; r < destination->memory.region_count; r++)
        if (!abandon_region(destination, &destination->memory.regions[r], result)) {
            result->region = r;
            return;
        }
    result->reason = LOOP_FINISHED;
}

uint64_t destination_lost(const struct destination *destination, struct page_run *runs, uint64_t run_max)
{
    uint64_t run_count = 0;
    for (uint32_t r = 0; r < destination->memory.region_count; r++) {
        const struct region *region = &destination->memory.regions[r];
        bool before = false;
        for (uint64_t i = 0; i < region->page_count; i++) {
            bool lost = PAGE_STATE(page_load(&destination->state[region->first_page + i])) == PAGE_LOST;
            if (lost && !before && run_count++ < run_max)
                runs[run_count - 1] = (struct page_run){.region = r, .page_index = i};
            if (lost && run_count <= run_max)
                runs[run_count - 1].page_count++;
            before = lost;
        }
    }
    return run_count;
}
