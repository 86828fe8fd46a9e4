/* What the guest discards at the destination: pages that are not here yet become zero for good, pages that are here became holes by
 * the discard itself. Two ways lead here.
 *
 * A REMOVE event. The kernel raises it before it makes the hole, and the guest goes on as soon as the event has been read: its page is
 * a hole, or written anew, while we still hold the event in our hands (tests/kernel/test_events.py). So only pages that the guest
 * has not got mapped are touched here: those that are claimed, which nobody else writes. One race is left: bytes that came by bulk
 * could be put into the file behind the hole and be PRESENT before the event is applied. So whoever brings them into place waits,
 * before it leaves its claim, until the events that were being read at that moment have been applied (events_applied): if they were
 * read later, then the hole comes later too, and takes the bytes with it. The thread that reads waits for nobody.
 *
 * A message on the guest socket, for discards that raise no event. The guest leaves the pages alone until it is answered; so all of them
 * are punched here, also those that came between the guest's own discard and its message. */
#include <errno.h>
#include <sched.h>
#include <sys/uio.h>
#include <unistd.h>

#include "../uffd/kernel.h"
#include "destination.h"
#include "result.h"

#define RUN_PAGES_MAX 64

void events_begin(struct destination *destination)
{
    if (destination->removed_is_zero)
        atomic_fetch_add(&destination->events_turn, 1);
}

void events_end(struct destination *destination)
{
    if (destination->removed_is_zero)
        atomic_fetch_add_explicit(&destination->events_turn, 1, memory_order_release);
}

void events_applied(struct destination *destination)
{
    if (!destination->removed_is_zero)
        return;
    atomic_thread_fence(memory_order_seq_cst); /* the bytes are in place, then we look: either we see the turn, or it sees the bytes */
    uint32_t turn = atomic_load(&destination->events_turn);
    while (turn % 2 != 0 && atomic_load_explicit(&destination->events_turn, memory_order_acquire) == turn)
        sched_yield();
}

ssize_t events_read(const struct destination *destination, void *messages, size_t size_bytes)
{
    /* Not read(2): the guest can clear O_NONBLOCK on the descriptor that it shares, and take the event itself. */
    struct iovec into = {messages, size_bytes};
    ssize_t read_bytes = preadv2(destination->userfaultfd, &into, 1, -1, RWF_NOWAIT);
    if (read_bytes < 0 && errno == EOPNOTSUPP) /* before Linux 6.10 */
        read_bytes = read(destination->userfaultfd, messages, size_bytes);
    return read_bytes;
}

void events_drain(struct destination *destination)
{
    struct uffd_msg message;
    while (events_read(destination, &message, sizeof(message)) > 0)
        ;
}

bool destination_leave_removed(struct destination *destination, const struct region *region, uint64_t page_index,
                               struct loop_result *result)
{
    uint64_t page = region->first_page + page_index;
    if (page_leave_receiving(&destination->state[page], PAGE_REMOVED)) {
        if (!destination_map_zero(destination, region, page_index, result))
            return false;
        destination_end_wait(destination, page, FAULT_ZERO);
    }
    count(&destination->pages_removed, 1);
    destination_became_final(destination, 1);
    return true;
}

/* In runs: what is not here is claimed and left as REMOVED. A copy that was held of it goes with the guest's own hole, which comes
 * behind the event, or is punched here with all the others. */
static bool remove_pages(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count, bool punch,
                         struct loop_result *result)
{
    if (region->page_chunks > 0)
        return claims_discard(destination, region, page_index, page_count, punch, result);
    for (uint64_t end = page_index + page_count; page_index < end; page_index += RUN_PAGES_MAX) {
        uint64_t run_pages = end - page_index < RUN_PAGES_MAX ? end - page_index : RUN_PAGES_MAX, claimed = 0;
        for (uint64_t i = 0; i < run_pages; i++)
            claimed |= (uint64_t)page_discard(&destination->state[region->first_page + page_index + i]) << i;
        int error_number = punch ? place_hole(region, page_index, run_pages) : 0;
        if (error_number != 0)
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "discard");
        for (; claimed != 0; claimed &= claimed - 1)
            if (!destination_leave_removed(destination, region, page_index + (uint64_t)__builtin_ctzll(claimed), result))
                return false;
    }
    return true;
}

bool destination_remove(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                        struct loop_result *result)
{
    return remove_pages(destination, region, page_index, page_count, false, result);
}

void destination_removed_is_zero(struct destination *destination)
{
    destination->removed_is_zero = true;
}

void destination_discard(struct destination *destination, uint32_t region, uint64_t page_index, uint64_t page_count,
                         struct loop_result *result)
{
    result_reset(result);
    if (remove_pages(destination, &destination->memory.regions[region], page_index, page_count, true, result))
        result->reason = LOOP_FINISHED;
}
