/* How fast bulk may go: a controller on samples and a clock that are handed in, and the bucket that spreads what is sent.
 *
 * Plain arithmetic, no system call, no lock: paced.c has those, and tests/path/pacer_main.c runs it on a simulated link. */
#ifndef POSTCOPY_PACER_H
#define POSTCOPY_PACER_H

#include <stdbool.h>
#include <stdint.h>

enum pacer_mode {
    PACER_RAMP,  /* the rate goes up until a queue stands or nothing seems to be in the way */
    PACER_OPEN,  /* nothing in the way that pacing could help: bulk goes as fast as it can */
    PACER_DRAIN, /* a queue stands: below the bottleneck until it is gone */
    PACER_HOLD,  /* just below the bottleneck */
};

/* One look at a bulk connection, and what happened since the last one. */
struct pacer_sample {
    uint64_t now_ns;
    uint64_t rtt_ns;      /* smoothed, as TCP has it */
    uint64_t unacked_bytes; /* on their way at this moment, over all connections */
    uint64_t acked_bytes;
    uint64_t starved_ns;  /* the receiver had no room: it is what limits, not the path */
    uint64_t blocked_ns;  /* the sender waited for room in its own socket since its last look: no silence, a path that is slower than the rate */
};

/* Samples are judged by windows. What stands in a queue is the least delay of a window: single ones are noise. Of both: the round trip, which
 * TCP smooths over the last eight, tells of a hiccup long after it, what is on its way does not; but that is bytes. */
struct pacer_window {
    uint64_t began_ns;
    uint64_t rtt_least_ns, unacked_least_bytes;
    uint64_t acked_bytes, starved_ns, sent_bytes;
    uint32_t samples;
};

struct pacer {
    enum pacer_mode mode;
    uint64_t rate_bytes;     /* a second; unless PACER_OPEN */
    uint64_t capacity_bytes; /* a second: of the bottleneck, as found last; 0: not known */
    uint64_t limit_bytes;    /* a second, the operator's; 0: none */
    uint64_t next_ns;        /* the next piece may go then */
    uint64_t base_rtt_ns;    /* of the path without a queue of ours; 0: not known */
    struct pacer_window window;
    uint64_t sampled_ns;
    uint32_t windows_standing, windows_ramped, windows_step;
    uint64_t steady_least_bytes, steady_most_bytes; /* a second, of the windows that stood in a row; PACER_OPEN */
    uint64_t found_most_bytes;            /* a second: what was sent when the queue came; it is no faster than that */
    uint64_t queue_acked_bytes, queue_ns; /* while the queue stood: its drain is the bottleneck's rate */
    uint64_t drain_until_ns;
    uint64_t doubt_left_ns; /* since the bottleneck was found slower than known: so long must go well before that was a hiccup */
    uint64_t probe_at_ns, probe_interval_ns;
};

void pacer_init(struct pacer *pacer);
/* From now on at most so many bytes a second, 0: as many as there is room for. */
void pacer_limit(struct pacer *pacer, uint64_t bytes_per_second, uint64_t now_ns);
/* The connection tells nothing (it is no TCP): only the limit holds. */
void pacer_blind(struct pacer *pacer);
void pacer_sample(struct pacer *pacer, const struct pacer_sample *sample);

/* Bytes a second that bulk goes at, at most; 0: as fast as it can. */
uint64_t pacer_rate(const struct pacer *pacer);
/* At which each socket should spread the pieces that it has; 0: no need to. */
uint64_t pacer_smooth_rate(const struct pacer *pacer);
/* To be sent in one go, at most. */
uint64_t pacer_piece_bytes(const struct pacer *pacer);
/* How long to wait before the next piece, at least; then ask again. 0: it may go. */
uint64_t pacer_wait_ns(const struct pacer *pacer, uint64_t now_ns);
void pacer_sent(struct pacer *pacer, uint64_t now_ns, uint64_t sent_bytes);

#endif
