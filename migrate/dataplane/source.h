/* One migration's source half, as its loops share it. */
#ifndef POSTCOPY_SOURCE_H
#define POSTCOPY_SOURCE_H

#include "channel.h"
#include "frame.h"
#include "memory.h"
#include "paced.h"

struct source {
    struct memory memory;
    int stop_fd;
    uint64_t poll_ns; /* how long the serve loop looks before it sleeps, at most */
    int open_fd;      /* readable: the guest is paused, its memory is final */
    int open_bulk_fd; /* readable: bulk may begin */
    int settled_fd;   /* readable: after precopy, the destination has said what it lacks */
    uint32_t streams; /* bulk connections */
    _Atomic uint8_t *sent;  /* one byte a page: has been sent by some path since the guest was paused */
    _Atomic uint8_t *chunk_sent;  /* the same of each chunk, where pages go out in pieces */
    _Atomic uint64_t *page_chunks; /* of each such page: how many have been (source.c) */
    int pagemap_fd;         /* of the guest, borrowed; -1: no precopy */
    _Atomic uint8_t *pending; /* precopy, one byte a page: to be sent in this round; after the pause: stale */
    bool recovering;        /* a connection has been lost: not the first epoch (epoch.c) */
    bool stale_is_found;    /* the last scan has been made */
    bool all_stale;         /* nothing is known of precopy any more: every page that is held there (source_restarted) */
    bool stale_is_known;    /* and the destination has applied what it found */
    struct paced paced;     /* bulk and precopy, over all their connections */
    _Atomic bool streaming; /* bulk sends: what nobody has asked for may go out */
    _Atomic uint64_t steer; /* flat page from which bulk goes on next: behind a fault (serve.c); STEER_NONE. Who takes it goes there */
    _Atomic int32_t rounds_of_faults; /* so many runs more of bulk are small ones */
#define X(name) _Atomic uint64_t name;
    SOURCE_COUNTERS(X)
#undef X
};

/* True for the caller who is the first to send the page. */
bool source_mark_sent(struct source *source, uint64_t page);
/* The same of chunks of a page, from *chunk on (0 at first), which steps to one that nobody has sent, or to the page's end: how many in
 * a row, at most chunk_count, are the caller's to send. */
uint64_t source_mark_chunks(struct source *source, const struct region *region, uint64_t page_index, uint64_t *chunk, uint64_t chunk_count);
/* So many have been sent; of these so many had content. True: these were the last of their page, of which *zero tells. */
bool source_chunks_sent(struct source *source, const struct region *region, uint64_t page_index, uint64_t chunk_count, uint64_t filled,
                        bool *zero);
/* Read the guest's memory, from a byte of the region on; never a signal. False: result says why not. */
bool source_read_bytes(const struct region *region, uint64_t start_bytes, uint64_t size_bytes, char *buffer, struct loop_result *result);
/* Are all bytes of the page, or chunk, zero? */
bool page_is_zero(const char *bytes, size_t size_bytes);
const struct region *region_of_page(const struct source *source, uint64_t page);

enum run_path { RUN_BULK, RUN_PRECOPY, RUN_AHEAD, RUN_URGENT };

/* What sends pages that nobody has asked for, and pieces of large ones: one run at a time, read into a hot buffer. */
struct run_sender {
    struct source *source;
    struct channel channel;
    char *buffer;
    size_t buffer_bytes;
    struct paced_link link;
    enum run_path path;
};
/* 0 or ENOMEM. */
int run_sender_init(struct run_sender *sender, struct source *source, int socket, enum run_path path);
void run_sender_deinit(struct run_sender *sender);
/* Pages that come whole: read and send [page_index, +page_count), at most buffer_bytes: alternating runs of pages and of zeroes. */
bool run_send(struct run_sender *sender, const struct region *region, uint64_t page_index, uint64_t page_count, struct loop_result *result);

/* Pages that come in pieces: a run of chunks, of what nobody has sent, from *chunk on, which steps behind it. */
bool run_send_piece(struct run_sender *sender, const struct region *region, uint64_t page_index, uint64_t *chunk, struct loop_result *result);
/* The same of the whole page for a round of precopy, piece by piece, whoever has sent it before. */
bool run_send_all(struct run_sender *sender, const struct region *region, uint64_t page_index, struct loop_result *result);

/* After the pause: what the guest wrote last (the stale set) to the destination, what it lacks back. False: result says why. */
bool source_settle(struct source *source, struct channel *channel, struct loop_result *result);

/* Whole pages, or a piece inside one. */
static inline struct frame_header frame_of_bytes(const struct source *source, enum frame_kind kind, const struct region *region,
                                                 uint64_t start_bytes, uint64_t size_bytes)
{
    uint64_t page_bytes = region->memory.page_bytes;
    return (struct frame_header){
        .magic = FRAME_MAGIC,
        .kind = (uint8_t)kind,
        .flags = (start_bytes + size_bytes) % page_bytes != 0 ? FRAME_FLAG_MORE : 0,
        .region = (uint32_t)(region - source->memory.regions),
        .page_index = start_bytes / page_bytes,
        .offset_bytes = (uint32_t)(start_bytes % page_bytes),
        .length_bytes = (uint32_t)size_bytes,
    };
}

#endif
