/* See readahead.h. The windows are those of the kernel's own readahead of files (mm/readahead.c: start small, double on each
 * hit, up to a bound), its one stream a file made several. What the kernel learns from marked pages, that the reader has come
 * half way, is not to be seen from the source: a stream stalls once a window.
 *
 * 64 pages at most: 256 would be asked for a quarter less often and let others' answers wait behind four times as many. */
#include "readahead.h"

#include <stddef.h>

#define WINDOW_PAGES_MIN 4
#define WINDOW_PAGES_MAX 64
#define PIECE_PAGES 16 /* what a request may have to wait behind */

static bool is_inside(const struct readahead_stream *stream, uint64_t page)
{
    return page < stream->expected && page + stream->window_pages >= stream->expected;
}

/* A little behind the window goes on with it too: what lies between has come by another path, or the reader strides. */
static bool goes_on(const struct readahead_stream *stream, uint64_t page)
{
    uint64_t slack_pages = stream->window_pages > WINDOW_PAGES_MIN ? stream->window_pages : WINDOW_PAGES_MIN;
    return stream->expected != 0 && page >= stream->expected && page - stream->expected < slack_pages;
}

static struct readahead_stream *find(struct readahead_stream *of, uint64_t page, bool (*is)(const struct readahead_stream *, uint64_t))
{
    for (uint32_t i = 0; i < READAHEAD_STREAMS; i++)
        if (is(&of[i], page))
            return &of[i];
    return NULL;
}

static struct readahead_stream *least_used(struct readahead_stream *of)
{
    struct readahead_stream *found = of;
    for (uint32_t i = 1; i < READAHEAD_STREAMS; i++)
        if (of[i].used < found->used)
            found = &of[i];
    return found;
}

uint64_t readahead_note(struct readahead *readahead, uint64_t page, uint64_t end_page)
{
    uint64_t request = ++readahead->requests;
    struct readahead_stream *stream = find(readahead->stream, page, is_inside);
    if (stream) /* on its way already */
        return stream->expected;
    stream = find(readahead->stream, page, goes_on);
    if (!stream) {
        struct readahead_stream *candidate = find(readahead->candidate, page, goes_on);
        if (!candidate) {
            *least_used(readahead->candidate) = (struct readahead_stream){.expected = page + 1, .cursor = page + 1, .used = request};
            return page + 1;
        }
        *candidate = (struct readahead_stream){0};
        stream = least_used(readahead->stream);
        stream->window_pages = 0;
    }
    uint64_t window_pages = stream->window_pages == 0 ? WINDOW_PAGES_MIN : 2 * stream->window_pages;
    if (window_pages > WINDOW_PAGES_MAX)
        window_pages = WINDOW_PAGES_MAX;
    uint64_t expected = page + 1 + window_pages < end_page ? page + 1 + window_pages : end_page;
    *stream = (struct readahead_stream){.expected = expected, .cursor = page + 1, .window_pages = window_pages, .used = request};
    return expected;
}

bool readahead_pending(const struct readahead *readahead)
{
    for (uint32_t i = 0; i < READAHEAD_STREAMS; i++)
        if (readahead->stream[i].cursor < readahead->stream[i].expected)
            return true;
    return false;
}

bool readahead_next(struct readahead *readahead, uint64_t *page, uint64_t *page_count)
{
    for (uint32_t i = 0; i < READAHEAD_STREAMS; i++) {
        struct readahead_stream *stream = &readahead->stream[readahead->turn++ % READAHEAD_STREAMS];
        if (stream->cursor >= stream->expected)
            continue;
        uint64_t left_pages = stream->expected - stream->cursor;
        *page = stream->cursor;
        *page_count = left_pages < PIECE_PAGES ? left_pages : PIECE_PAGES;
        stream->cursor += *page_count;
        return true;
    }
    return false;
}
