/* Answers that go out in pieces: large pages asked for. While one is under way, requests are read and small pages answered between
 * any two pieces, so that nobody waits behind a GiB; of two large pages the smaller goes first. For one thread; no allocation. */
#ifndef POSTCOPY_ANSWERS_H
#define POSTCOPY_ANSWERS_H

#include "source.h"

#define ANSWERS_MAX 256 /* so many threads may wait for large pages; further requests are read when one has gone out */

struct answers {
    struct {
        const struct region *region;
        uint64_t page_index;
        uint64_t chunk; /* those before it have gone out */
    } answer[ANSWERS_MAX];
    uint32_t count; /* in the order in which they were asked for */
};

/* How many requests may be read now. */
static inline uint32_t answers_room(const struct answers *answers)
{
    return ANSWERS_MAX - answers->count;
}
/* Below answers_room() of them. */
void answers_put(struct answers *answers, const struct region *region, uint64_t page_index);
/* The next piece of one answer; what bulk has sent of it is left out. False: result says why. */
bool answers_send(struct answers *answers, struct run_sender *sender, struct loop_result *result);

#endif
