/* One connection as the loops see it: plain TCP, or TLS (tls.h) behind the same calls. */
#ifndef POSTCOPY_CHANNEL_H
#define POSTCOPY_CHANNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>
#include <sys/uio.h>

#include "dataplane.h"

struct tls_session;

struct channel {
    int socket; /* borrowed */
    struct tls_session *tls; /* that is on it, or NULL */
    size_t expected_bytes;
    uint64_t blocked_ns; /* that channel_send_all has waited for room in the socket, in all */
    int send_flags; /* MSG_EOR: what is sent in one call leaves in one packet or run of packets, not joined to others */
};

/* On a socket, or on none (-1). */
struct channel channel_of(int socket);

/* Let a wait for input end only when that much is there (or the connection ends): a wake-up costs more than many copies.
 * Never more than the peer is known to send next. False: result says why not. */
bool channel_expect(struct channel *channel, size_t expected_bytes, struct loop_result *result);

/* Never waits. Bytes received, 0 when nothing is there now, -1 with result set when the connection ended or failed. */
ssize_t channel_receive(struct channel *channel, void *buffer, size_t capacity_bytes, struct loop_result *result);
/* Never waits. Bytes taken (perhaps 0), -1 with result set. */
ssize_t channel_send(struct channel *channel, const void *bytes, size_t size_bytes, struct loop_result *result);
/* Sends all of it, waiting as long as the peer needs or until stop_fd is readable. False: result says why not. */
bool channel_send_all(struct channel *channel, struct iovec *pieces, int piece_count, int stop_fd, struct loop_result *result);

/* Input is here for which poll(2) would not wake us. */
bool channel_has_input(const struct channel *channel);
/* wait_ready for input. */
bool channel_wait(const struct channel *channel, int stop_fd, struct loop_result *result);

/* wait_ready for room in the socket, timed. */
bool channel_wait_room(int socket, uint64_t *blocked_ns, int stop_fd, struct loop_result *result);
/* Wait until fd is ready for events. True: it is. False: stop_fd became readable (LOOP_STOPPED) or poll failed. */
bool wait_ready(int fd, short events, int stop_fd, struct loop_result *result);

#endif
