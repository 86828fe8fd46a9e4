/* A new epoch: the connections of the last one are gone, new ones are about to be used. Between the two every loop has returned.
 *
 * What was in flight is nowhere now. Nothing that either side remembers of it counts: the destination asks once more for each
 * page that a fault waits for (fault.c) and says what it lacks besides (precopied.c), and that is what bulk sends from then on.
 * Asking the source is always right: after the pause it holds the truth of every page (P2). Page states stay as they are: a claim is
 * never held across a wait for the network (P1), so none is RECEIVING here, but for large pages of which a part has come (claims.h). */
#include <sys/eventfd.h>

#include "destination.h"
#include "source.h"

static void drain(int fd)
{
    eventfd_t value;
    eventfd_read(fd, &value); /* EAGAIN: it was not set */
}

void destination_next_epoch(struct destination *destination)
{
    drain(destination->stop_fd);
    destination->recovering = true;
    for (uint64_t page = 0; page < destination->memory.page_total; page++) /* what came by which path begins anew */
        atomic_fetch_and_explicit(&destination->copies[page], COPY_STALE | COPY_TOUCHED | COPY_IN_FILE, memory_order_relaxed);
    claims_next_epoch(destination);
    atomic_store_explicit(&destination->requests_outstanding, 0, memory_order_relaxed);
    atomic_store_explicit(&destination->bulk_next, STEER_NONE, memory_order_relaxed);
}

bool destination_is_settled(const struct destination *destination)
{
    bool precopied = atomic_load_explicit(&destination->marks, memory_order_relaxed) > 0;
    return !precopied || atomic_load_explicit(&destination->settled_ns, memory_order_relaxed) != 0;
}

void source_restarted(struct source *source)
{
    source->all_stale = true;
}

void source_next_epoch(struct source *source, bool settled)
{
    drain(source->stop_fd);
    drain(source->settled_fd);
    source->recovering = true;
    source->stale_is_known = settled;
    for (uint64_t page = 0; page < source->memory.page_total; page++)
        atomic_store_explicit(&source->sent[page], 0, memory_order_relaxed);
    for (uint64_t chunk = 0; chunk < source->memory.chunk_total; chunk++)
        atomic_store_explicit(&source->chunk_sent[chunk], 0, memory_order_relaxed);
    for (uint64_t large = 0; large < source->memory.large_total; large++)
        atomic_store_explicit(&source->page_chunks[large], 0, memory_order_relaxed);
    atomic_store_explicit(&source->pages_sent, 0, memory_order_relaxed);
    atomic_store_explicit(&source->streaming, false, memory_order_relaxed);
    atomic_store_explicit(&source->rounds_of_faults, 0, memory_order_relaxed);
    atomic_store_explicit(&source->steer, STEER_NONE, memory_order_relaxed);
}
