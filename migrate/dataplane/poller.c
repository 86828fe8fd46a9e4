/* See poller.h. It adjusts itself as the kernel's haltpoll governor does (Documentation/virt/guest-halt-polling.rst): something that comes
 * soon after we fell asleep is worth looking longer for, something that comes late is not worth looking for at all. So a
 * migration whose guest has stopped faulting costs no CPU time. */
#include "poller.h"

#include <stdatomic.h>
#include <stdbool.h>

#include "histogram.h"

#define START_NS 10000u
#define GROW 2
#define SHRINK 2

static void adjust(struct poller *poller, uint64_t waited_ns)
{
    if (waited_ns > poller->most_ns)
        poller->now_ns = poller->now_ns / SHRINK < START_NS ? 0 : poller->now_ns / SHRINK;
    else if (poller->now_ns < START_NS)
        poller->now_ns = START_NS;
    else
        poller->now_ns *= GROW;
    if (poller->now_ns > poller->most_ns)
        poller->now_ns = poller->most_ns;
}

int poller_wait(struct poller *poller, struct pollfd *polled, nfds_t count, _Atomic uint64_t *polled_ns)
{
    if (poller->most_ns == 0)
        return poll(polled, count, -1);
    uint64_t start_ns = clock_monotonic_ns(), looked_ns = 0;
    int ready;
    do {
        ready = poll(polled, count, 0);
        looked_ns = clock_monotonic_ns() - start_ns;
    } while (ready == 0 && looked_ns < poller->now_ns);
    atomic_fetch_add_explicit(polled_ns, looked_ns, memory_order_relaxed);
    if (ready != 0)
        return ready;
    ready = poll(polled, count, -1);
    adjust(poller, clock_monotonic_ns() - start_ns);
    return ready;
}
