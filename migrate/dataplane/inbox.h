/* Frames of one connection at the destination: bytes in, whole pages out, or whole chunks of large ones (claims.h). Serves the urgent and the bulk connection. */
#ifndef POSTCOPY_INBOX_H
#define POSTCOPY_INBOX_H

#include "channel.h"
#include "destination.h"
#include "frame.h"
#include "verdict.h"

/* What may come on the connection now. */
enum inbox_phase {
    INBOX_FINAL,   /* pages and zeroes of a guest that is paused for good */
    INBOX_PRECOPY, /* pages and zeroes to be held, and at last the mark */
    INBOX_MARKED,  /* nothing, until the guest has been resumed here */
    INBOX_STALE,   /* the stale set, in its order; after it, INBOX_FINAL */
};

struct inbox {
    struct channel channel;
    enum page_path path;
    enum inbox_phase phase;
    struct verdict_cursor stale; /* what the stale set has come to */
    char *buffer; /* the hot buffer: bytes wait here until their page is whole */
    size_t capacity_bytes;
    size_t start, end;         /* what is in it */
    struct frame_header frame; /* whose payload is being read */
    uint64_t next_unit;          /* of its region: a page, or a chunk where pages come in chunks */
    uint64_t payload_bytes_left; /* of that frame; 0: a header comes next */
};

/* 0 or an errno. */
int inbox_init(struct inbox *inbox, const struct destination *destination, int socket, enum page_path path);
void inbox_deinit(struct inbox *inbox);

/* On the urgent connection of a guest with large pages: let a wait end when a chunk is there, where one is on its way. */
bool inbox_expect_chunk(struct inbox *inbox, const struct destination *destination, struct loop_result *result);
/* Let a wait end only when the rest of the current frame is there, or as much of it as fits. */
bool inbox_expect_run(struct inbox *inbox, const struct destination *destination, struct loop_result *result);

/* Receive what is there and take every whole page of it. False: result says why not. */
bool inbox_take(struct inbox *inbox, struct destination *destination, struct loop_result *result);
/* Take what is in the buffer already, after the phase has changed. */
bool inbox_take_buffered(struct inbox *inbox, struct destination *destination, struct loop_result *result);

#endif
