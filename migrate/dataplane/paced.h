/* Bulk onto a connection, paced: one controller (pacer.h) for all bulk connections of a migration. */
#ifndef POSTCOPY_PACED_H
#define POSTCOPY_PACED_H

#include <pthread.h>

#include "channel.h"
#include "pacer.h"

struct paced {
    pthread_mutex_t lock; /* of bulk threads alone: nothing urgent takes it */
    struct pacer pacer;
    bool never; /* only the limit holds */
    uint64_t unacked_bytes;       /* of all links, as each was seen last */
    _Atomic uint64_t rate_bytes;  /* the pacer's, to be read without the lock */
    _Atomic uint64_t *waited_ns; /* how long bulk was kept waiting, of all its threads */
};

/* What a bulk connection has told so far. */
struct paced_link {
    bool known;
    uint64_t smooth_rate; /* at which the socket has been told to spread what it has; 0: not at all */
    bool nearby;   /* the peer is on this host: there is no device in whose queue bulk could stand in front of urgent */
    bool by_turns; /* its thread sleeps between pieces, and is scheduled for that */
    uint64_t sampled_ns, acked_bytes, starved_us, unacked_bytes;
    uint64_t blocked_ns; /* the channel's, at sampled_ns: a full socket lets go when a third of it is free */
};

void paced_init(struct paced *paced, _Atomic uint64_t *waited_ns);
void paced_deinit(struct paced *paced);
/* Before anything is sent: no controller. */
void paced_never(struct paced *paced);
/* At any time, from any thread. 0: none. */
void paced_limit(struct paced *paced, uint64_t bytes_per_second);
/* Bytes a second; 0: as fast as it can. Takes no lock. */
uint64_t paced_rate(const struct paced *paced);
/* After the last paced_send of this link: its connection is as it was before the first. */
void paced_leave(struct paced *paced, struct paced_link *link, struct channel *channel);
/* channel_send_all, when and as fast as the pacer lets it. */
bool paced_send(struct paced *paced, struct paced_link *link, struct channel *channel, struct iovec *pieces, int piece_count,
                int stop_fd, struct loop_result *result);

#endif
