/* See poller.h. It adjusts itself as the kernel's haltpoll governor does (Documentation/virt/guest-halt-polling.rst): something that comes
 * soon after we fell asleep is worth looking longer for, something that comes late is not worth looking for at all. So a
 * migration whose guest has stopped faulting costs no CPU time. */
#include "poller.h"

#include <sched.h>
#include <stdatomic.h>

#include "histogram.h"

#define START_NS 10000u
#define GROW 2
#define SHRINK 2
#define CONTENDED_NS 10000u /* of one look and one yield, which take about a microsecond */
#define RESTING_WAITS 256u

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

/* Look until something is there (or poll failed), or long enough. A look that took long was one in which somebody else ran here:
 * a thread that looks keeps it, or the guest itself, from this CPU, and so it rests. */
static int look(struct poller *poller, struct pollfd *polled, nfds_t count, uint64_t start_ns, uint64_t *looked_ns)
{
    uint64_t before_ns = start_ns;
    for (;;) {
        int ready = poll(polled, count, 0);
        uint64_t now_ns = clock_monotonic_ns();
        *looked_ns = now_ns - start_ns;
        if (ready != 0 || *looked_ns >= poller->now_ns)
            return ready;
        sched_yield();
        if (now_ns - before_ns > CONTENDED_NS) {
            poller->resting = RESTING_WAITS;
            return 0;
        }
        before_ns = now_ns;
    }
}

int poller_wait(struct poller *poller, struct pollfd *polled, nfds_t count, _Atomic uint64_t *polled_ns)
{
    if (poller->most_ns == 0)
        return poll(polled, count, -1);
    if (poller->resting > 0) {
        poller->resting--;
        return poll(polled, count, -1);
    }
    uint64_t start_ns = clock_monotonic_ns(), looked_ns = 0;
    int ready = look(poller, polled, count, start_ns, &looked_ns);
    atomic_fetch_add_explicit(polled_ns, looked_ns, memory_order_relaxed);
    if (ready != 0)
        return ready;
    ready = poll(polled, count, -1);
    adjust(poller, clock_monotonic_ns() - start_ns);
    return ready;
}
