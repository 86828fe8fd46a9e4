/* The destination before it knows what is final: pages that are held, the stale set that judges them, and the way back. */
#ifndef POSTCOPY_PRECOPIED_H
#define POSTCOPY_PRECOPIED_H

#include "channel.h"
#include "destination.h"

/* Pages of a round, while the guest runs at the source: brought into place and held, never mapped. False: result says why. */
bool precopy_hold_pages(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                        const char *bytes, struct loop_result *result);
bool precopy_hold_zeroes(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                         struct loop_result *result);

/* One frame of the stale set: a bit a page, set for stale. */
void settle_judge(struct destination *destination, const struct region *region, uint64_t page_index, uint64_t page_count,
                  const uint8_t *stale);
/* The set is whole: say what is lacking, and map ahead what is here. False: result says why. */
bool settle_end(struct destination *destination, struct channel *channel, struct loop_result *result);

#endif
