/* See channel.h. */
#include "channel.h"

#include <poll.h>
#include <sys/socket.h>

#include "result.h"
#include "tls.h"

#define EXPECTED_BYTES_MAX (1 << 20) /* well below what the receive buffer may grow to */

struct channel channel_of(int socket)
{
    return (struct channel){.socket = socket, .tls = socket >= 0 ? tls_on(socket) : NULL};
}

static ssize_t moved_or_failed(ssize_t moved_bytes, const char *where, struct loop_result *result)
{
    if (moved_bytes >= 0)
        return moved_bytes;
    if (errno == EAGAIN || errno == EINTR)
        return 0;
    result_fail(result, errno == EPIPE || errno == ECONNRESET ? LOOP_PEER_CLOSED : LOOP_CONNECTION_FAILED, errno, where);
    return -1;
}

bool channel_expect(struct channel *channel, size_t expected_bytes, struct loop_result *result)
{
    if (channel->tls) /* its records are more than that together, but of one a part may have been received already */
        expected_bytes = expected_bytes > TLS_HELD_BYTES ? expected_bytes - TLS_HELD_BYTES : 1;
    if (channel->socket < 0 || expected_bytes == channel->expected_bytes) /* nothing comes where there is no connection */
        return true;
    int least_bytes = expected_bytes > EXPECTED_BYTES_MAX ? EXPECTED_BYTES_MAX : (int)expected_bytes;
    if (setsockopt(channel->socket, SOL_SOCKET, SO_RCVLOWAT, &least_bytes, sizeof(least_bytes)) < 0)
        return result_fail(result, LOOP_CONNECTION_FAILED, errno, "SO_RCVLOWAT");
    channel->expected_bytes = expected_bytes;
    return true;
}

ssize_t channel_receive(struct channel *channel, void *buffer, size_t capacity_bytes, struct loop_result *result)
{
    if (channel->tls)
        return tls_receive(channel->tls, buffer, capacity_bytes, result);
    ssize_t received_bytes = recv(channel->socket, buffer, capacity_bytes, MSG_DONTWAIT);
    if (received_bytes == 0) {
        result_fail(result, LOOP_PEER_CLOSED, 0, "recv");
        return -1;
    }
    return moved_or_failed(received_bytes, "recv", result);
}

ssize_t channel_send(struct channel *channel, const void *bytes, size_t size_bytes, struct loop_result *result)
{
    if (channel->tls)
        return tls_send(channel->tls, bytes, size_bytes, result);
    return moved_or_failed(send(channel->socket, bytes, size_bytes, MSG_DONTWAIT | MSG_NOSIGNAL), "send", result);
}

bool channel_has_input(const struct channel *channel)
{
    return channel->tls && tls_has_input(channel->tls);
}

bool channel_wait(const struct channel *channel, int stop_fd, struct loop_result *result)
{
    return channel_has_input(channel) || wait_ready(channel->socket, POLLIN, stop_fd, result);
}

bool wait_ready(int fd, short events, int stop_fd, struct loop_result *result)
{
    struct pollfd polled[2] = {{.fd = fd, .events = events}, {.fd = stop_fd, .events = POLLIN}};
    for (;;) {
        if (poll(polled, 2, -1) < 0) {
            if (errno == EINTR)
                continue;
            return result_fail(result, LOOP_CONNECTION_FAILED, errno, "poll");
        }
        if (polled[1].revents)
            return result_fail(result, LOOP_STOPPED, 0, "poll");
        if (polled[0].revents) /* an error shows in the call that follows */
            return true;
    }
}

bool channel_wait_room(int socket, uint64_t *blocked_ns, int stop_fd, struct loop_result *result)
{
    uint64_t began_ns = clock_monotonic_ns();
    bool ready = wait_ready(socket, POLLOUT, stop_fd, result);
    *blocked_ns += clock_monotonic_ns() - began_ns;
    return ready;
}

bool channel_send_all(struct channel *channel, struct iovec *pieces, int piece_count, int stop_fd, struct loop_result *result)
{
    if (channel->tls)
        return tls_send_all(channel->tls, pieces, piece_count, channel->send_flags, &channel->blocked_ns, stop_fd, result);
    while (piece_count > 0) {
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = (size_t)piece_count};
        ssize_t sent_bytes = moved_or_failed(sendmsg(channel->socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL | channel->send_flags), "sendmsg", result);
        if (sent_bytes < 0)
            return false;
        if (sent_bytes == 0 && !channel_wait_room(channel->socket, &channel->blocked_ns, stop_fd, result))
            return false;
        size_t left_bytes = (size_t)sent_bytes;
        while (piece_count > 0 && left_bytes >= pieces->iov_len) {
            left_bytes -= pieces->iov_len;
            pieces++;
            piece_count--;
        }
        if (piece_count > 0) {
            pieces->iov_base = (char *)pieces->iov_base + left_bytes;
            pieces->iov_len -= left_bytes;
        }
    }
    return true;
}
