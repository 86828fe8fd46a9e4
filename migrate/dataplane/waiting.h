/* Since when a fault has been waiting for a page: a small fixed table, no lock, no allocation.
 * The fault loop puts in before it sets WANTED; whoever resolves the page takes out. Full: the fault is not timed. */
#ifndef POSTCOPY_WAITING_H
#define POSTCOPY_WAITING_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define WAITING_SLOTS 1024
#define WAITING_PROBES 16

struct waiting {
    struct {
        _Atomic uint64_t key; /* flat page number + 1; 0: free */
        _Atomic uint64_t since_ns;
    } slot[WAITING_SLOTS];
};

/* False when there is no room near its place. A page already waiting keeps its earlier time. */
bool waiting_put(struct waiting *waiting, uint64_t page, uint64_t since_ns);
/* True with the time when the page was waiting; each put is taken at most once. */
bool waiting_take(struct waiting *waiting, uint64_t page, uint64_t *since_ns);

#endif
