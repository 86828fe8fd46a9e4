/* Faults that wait a moment before the source is asked: bulk is about to bring their page.
 *
 * Who reads in order overtakes bulk again and again. Each page right ahead of it is then asked for one by one, comes twice, and
 * keeps from the CPU the very threads that bring it: thousands of stalls where one would do (README, `sequential`). So a fault
 * that follows others, close ahead of where bulk comes in, is given PATIENCE_NS; then the source is asked after all. A random
 * fault follows none, and never waits. */
#ifndef POSTCOPY_PATIENCE_H
#define POSTCOPY_PATIENCE_H

#include <stdbool.h>
#include <stdint.h>

#define PATIENCE_WAITS 64
#define PATIENCE_RECENT 8

struct patience {
    int timer_fd; /* readable: somebody's time is up */
    struct {
        uint64_t page, until_ns;
    } wait[PATIENCE_WAITS]; /* a ring: all wait for the same time, so the first is the next */
    uint32_t first, count;
    uint64_t recent[PATIENCE_RECENT]; /* pages of the last remote faults */
    uint32_t recent_next;
};

/* 0 or an errno. */
int patience_init(struct patience *patience);
void patience_deinit(struct patience *patience);

/* A fault on an absent page. bulk_next: where bulk comes in, a flat page. True: do not ask for it now. */
bool patience_put(struct patience *patience, uint64_t page, uint64_t bulk_next, uint64_t now_ns);
/* The next page whose time is up, in any state by now; call until false. */
bool patience_take(struct patience *patience, uint64_t now_ns, uint64_t *page);

#endif
