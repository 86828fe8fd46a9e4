/* Which pages a guest will want next, told from those that it asked for.
 *
 * Requests that go on where others ended are a stream. Its window, the pages sent behind the one asked for, doubles with each
 * request that goes on and is nothing for one that does not: it grows with sequential access and collapses on random. Several
 * threads, or several arrays, are several streams.
 *
 * Nothing but arithmetic on flat page numbers, for one thread: no lock, no allocation. */
#ifndef POSTCOPY_READAHEAD_H
#define POSTCOPY_READAHEAD_H

#include <stdbool.h>
#include <stdint.h>

#define READAHEAD_STREAMS 8

struct readahead_stream {
    uint64_t expected;     /* flat page behind the window: a request there goes on with it; 0: nobody's */
    uint64_t cursor;       /* what of the window is still to be sent: [cursor, expected) */
    uint64_t window_pages; /* 0: nothing has gone on with it yet */
    uint64_t used;         /* number of the last request that did */
};

struct readahead {
    struct readahead_stream stream[READAHEAD_STREAMS];
    struct readahead_stream candidate[READAHEAD_STREAMS]; /* apart: random requests never push a stream out */
    uint64_t requests;
    uint32_t turn; /* streams with something to send take turns */
};

/* A page is asked for; its region ends before end_page. Returns the page behind all that goes out ahead because of it:
 * page + 1 where it goes on with nothing. */
uint64_t readahead_note(struct readahead *readahead, uint64_t page, uint64_t end_page);

/* Is anything to be sent ahead? */
bool readahead_pending(const struct readahead *readahead);
/* Hand out a piece of a window, a few pages from *page on. False: nothing is pending. */
bool readahead_next(struct readahead *readahead, uint64_t *page, uint64_t *page_count);

#endif
