/* Waiting that looks for a short while before it sleeps: waking a thread on a halted CPU costs more than a fault's own work. */
#ifndef POSTCOPY_POLLER_H
#define POSTCOPY_POLLER_H

#include <poll.h>
#include <stdint.h>

struct poller {
    uint64_t most_ns; /* 0: always sleep */
    uint64_t now_ns;  /* how long it looks now, at most most_ns */
    uint32_t resting; /* so many waits more it does not look: somebody else wants the CPU */
};

/* poll(2) without a deadline. The time spent looking is added to *polled_ns. */
int poller_wait(struct poller *poller, struct pollfd *polled, nfds_t count, _Atomic uint64_t *polled_ns);

#endif
