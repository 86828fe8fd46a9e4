/* One migration's source half, as its loops share it. */
#ifndef POSTCOPY_SOURCE_H
#define POSTCOPY_SOURCE_H

#include "channel.h"
#include "frame.h"
#include "memory.h"

struct source {
    struct memory memory;
    int stop_fd;
    uint64_t poll_ns; /* how long the serve loop looks before it sleeps, at most */
    int open_fd;      /* readable: the guest is paused, its memory is final */
    int open_bulk_fd; /* readable: bulk may begin */
    _Atomic uint8_t *sent;  /* one byte a page: has been sent by some path since the guest was paused */
    int pagemap_fd;         /* of the guest, borrowed; -1: no precopy */
    _Atomic uint8_t *pending; /* precopy, one byte a page: to be sent in this round; after the pause: stale */
    _Atomic bool streaming; /* bulk sends: what nobody has asked for may go out */
    _Atomic uint64_t steer; /* flat page from which bulk goes on next: behind a fault (serve.c); STEER_NONE */
#define X(name) _Atomic uint64_t name;
    SOURCE_COUNTERS(X)
#undef X
};

/* True for the caller who is the first to send the page. */
bool source_mark_sent(struct source *source, uint64_t page);
/* Read whole pages of the guest's memory; never a signal. False: result says why not. */
bool source_read_pages(const struct region *region, uint64_t page_index, uint64_t page_count, char *buffer, struct loop_result *result);
/* Are all the page's bytes zero? */
bool page_is_zero(const char *bytes, size_t size_bytes);
const struct region *region_of_page(const struct source *source, uint64_t page);

enum run_path { RUN_BULK, RUN_PRECOPY, RUN_AHEAD };

/* What sends pages that nobody has asked for: one run at a time, read into a hot buffer. */
struct run_sender {
    struct source *source;
    struct channel channel;
    char *buffer;
    size_t buffer_bytes;
    enum run_path path;
};
/* 0 or ENOMEM. */
int run_sender_init(struct run_sender *sender, struct source *source, int socket, enum run_path path);
void run_sender_deinit(struct run_sender *sender);
/* Read and send [page_index, +page_count), at most buffer_bytes: alternating runs of pages and of zeroes. */
bool run_send(struct run_sender *sender, const struct region *region, uint64_t page_index, uint64_t page_count, struct loop_result *result);

/* After the pause: what the guest wrote last (the stale set) to the destination, what it lacks back. False: result says why. */
bool source_settle(struct source *source, struct channel *channel, struct loop_result *result);

static inline struct frame_header frame_of_run(const struct source *source, enum frame_kind kind, const struct region *region,
                                               uint64_t page_index, uint64_t page_count)
{
    return (struct frame_header){
        .magic = FRAME_MAGIC,
        .kind = (uint8_t)kind,
        .region = (uint32_t)(region - source->memory.regions),
        .page_index = page_index,
        .length_bytes = (uint32_t)(page_count * region->memory.page_bytes),
    };
}

#endif
