/* See paced.h. */
#include "paced.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdatomic.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

#include "result.h"
#include "schedule.h"

#define SAMPLE_NS UINT64_C(250000)
#define PARTS_MAX 2

/* With the lock held, whenever the pacer may have changed its mind. */
static void publish(struct paced *paced)
{
    atomic_store_explicit(&paced->rate_bytes, pacer_rate(&paced->pacer), memory_order_relaxed);
}

void paced_init(struct paced *paced, _Atomic uint64_t *waited_ns)
{
    memset(paced, 0, sizeof(*paced));
    pthread_mutex_init(&paced->lock, NULL);
    pacer_init(&paced->pacer);
    publish(paced);
    paced->waited_ns = waited_ns;
}

void paced_never(struct paced *paced)
{
    paced->never = true;
    pacer_blind(&paced->pacer);
    publish(paced);
}

void paced_deinit(struct paced *paced)
{
    pthread_mutex_destroy(&paced->lock);
}

void paced_limit(struct paced *paced, uint64_t bytes_per_second)
{
    pthread_mutex_lock(&paced->lock);
    pacer_limit(&paced->pacer, bytes_per_second, clock_monotonic_ns());
    publish(paced);
    pthread_mutex_unlock(&paced->lock);
}

uint64_t paced_rate(const struct paced *paced)
{
    return atomic_load_explicit(&paced->rate_bytes, memory_order_relaxed);
}

/* Who sleeps between any two pieces has little to do and must be on time; SCHED_BATCH beside busy threads is milliseconds late, which
 * is a tenth of the rate. Who just sends is kept from disturbing others (schedule.h). */
static void schedule(struct paced_link *link, bool by_turns)
{
    if (link->by_turns == by_turns)
        return;
    link->by_turns = by_turns;
    if (by_turns)
        schedule_soon();
    else
        schedule_bulk();
    prctl(PR_SET_TIMERSLACK, by_turns ? 1ul : 0ul, 0ul, 0ul, 0ul); /* 50 us, the usual, is most of a piece's time; 0: the usual */
}

/* TCP spreads packets by a timer of its own (SO_MAX_PACING_RATE, without the fq qdisc too, 4.13), which is on time when this thread is
 * not, and costs a tenth of its wake-ups. It would join pieces to runs of 64 KiB at this rate: MSG_EOR keeps them apart. */
static void smooth(struct paced_link *link, struct channel *channel, uint64_t smooth_rate)
{
    if (link->smooth_rate == smooth_rate)
        return;
    link->smooth_rate = smooth_rate;
    unsigned long most = smooth_rate == 0 ? ~0ul : (unsigned long)smooth_rate;
    setsockopt(channel->socket, SOL_SOCKET, SO_MAX_PACING_RATE, &most, sizeof(most));
    channel->send_flags = smooth_rate == 0 ? 0 : MSG_EOR;
}

static bool sleep_for(struct paced *paced, uint64_t wait_ns, int stop_fd, struct loop_result *result)
{
    uint64_t began_ns = clock_monotonic_ns();
    struct pollfd polled = {.fd = stop_fd, .events = POLLIN};
    struct timespec timeout = {.tv_sec = (time_t)(wait_ns / 1000000000), .tv_nsec = (long)(wait_ns % 1000000000)};
    int ready = ppoll(&polled, 1, &timeout, NULL);
    atomic_fetch_add_explicit(paced->waited_ns, clock_monotonic_ns() - began_ns, memory_order_relaxed);
    if (ready > 0)
        return result_fail(result, LOOP_STOPPED, 0, "ppoll");
    return ready == 0 || errno == EINTR || result_fail(result, LOOP_CONNECTION_FAILED, errno, "ppoll");
}

/* Until it may go; how much of it then. 0: result says why not. */
static uint64_t wait_for_turn(struct paced *paced, struct paced_link *link, struct channel *channel, int stop_fd, struct loop_result *result)
{
    for (;;) {
        uint64_t now_ns = clock_monotonic_ns();
        pthread_mutex_lock(&paced->lock);
        uint64_t wait_ns = pacer_wait_ns(&paced->pacer, now_ns), piece_bytes = pacer_piece_bytes(&paced->pacer);
        uint64_t smooth_rate = pacer_smooth_rate(&paced->pacer);
        bool by_turns = pacer_rate(&paced->pacer) != 0;
        pthread_mutex_unlock(&paced->lock);
        schedule(link, by_turns);
        smooth(link, channel, smooth_rate);
        if (wait_ns == 0)
            return piece_bytes;
        if (!sleep_for(paced, wait_ns, stop_fd, result))
            return 0;
    }
}

/* Both ends have one address: what is sent goes through no device. Delay over loopback is that of CPUs, and says nothing of a queue. */
static bool is_nearby(const struct channel *channel)
{
    struct sockaddr_in6 ours = {0}, theirs = {0}; /* the larger one */
    socklen_t our_bytes = sizeof(ours), their_bytes = sizeof(theirs);
    if (getsockname(channel->socket, (struct sockaddr *)&ours, &our_bytes) < 0 ||
        getpeername(channel->socket, (struct sockaddr *)&theirs, &their_bytes) < 0 || ours.sin6_family != theirs.sin6_family)
        return false;
    if (ours.sin6_family == AF_INET6)
        return memcmp(&ours.sin6_addr, &theirs.sin6_addr, sizeof(ours.sin6_addr)) == 0;
    return ours.sin6_family == AF_INET &&
           ((struct sockaddr_in *)&ours)->sin_addr.s_addr == ((struct sockaddr_in *)&theirs)->sin_addr.s_addr;
}

/* False: it is no TCP, or an older kernel's. */
static bool look(const struct channel *channel, struct paced_link *link, uint64_t now_ns, struct pacer_sample *sample)
{
    struct tcp_info info;
    socklen_t info_bytes = sizeof(info);
    if (getsockopt(channel->socket, IPPROTO_TCP, TCP_INFO, &info, &info_bytes) < 0 || info_bytes < sizeof(info))
        return false;
    *sample = (struct pacer_sample){.now_ns = now_ns, .rtt_ns = info.tcpi_rtt * UINT64_C(1000),
                                    .unacked_bytes = info.tcpi_bytes_sent - info.tcpi_bytes_retrans - info.tcpi_bytes_acked};
    if (link->known) {
        sample->acked_bytes = info.tcpi_bytes_acked - link->acked_bytes;
        sample->starved_ns = (info.tcpi_rwnd_limited - link->starved_us) * 1000;
    }
    link->known = true;
    link->acked_bytes = info.tcpi_bytes_acked;
    link->starved_us = info.tcpi_rwnd_limited;
    return true;
}

static void note_sent(struct paced *paced, struct paced_link *link, const struct channel *channel, uint64_t sent_bytes)
{
    uint64_t now_ns = clock_monotonic_ns();
    struct pacer_sample sample = {0};
    bool due = !paced->never && !link->nearby && now_ns - link->sampled_ns >= SAMPLE_NS;
    if (due && !link->known)
        link->nearby = is_nearby(channel);
    bool seen = due && !link->nearby && look(channel, link, now_ns, &sample);
    if (due) {
        sample.blocked_ns = channel->blocked_ns - link->blocked_ns;
        link->sampled_ns = now_ns;
        link->blocked_ns = channel->blocked_ns;
    }
    pthread_mutex_lock(&paced->lock);
    pacer_sent(&paced->pacer, now_ns, sent_bytes);
    if (seen) {
        paced->unacked_bytes += sample.unacked_bytes - link->unacked_bytes;
        link->unacked_bytes = sample.unacked_bytes;
        sample.unacked_bytes = paced->unacked_bytes;
        pacer_sample(&paced->pacer, &sample);
    } else if (due) {
        pacer_blind(&paced->pacer);
    }
    publish(paced);
    pthread_mutex_unlock(&paced->lock);
}

void paced_leave(struct paced *paced, struct paced_link *link, struct channel *channel)
{
    pthread_mutex_lock(&paced->lock);
    paced->unacked_bytes -= link->unacked_bytes;
    pthread_mutex_unlock(&paced->lock);
    link->unacked_bytes = 0;
    smooth(link, channel, 0);
}

/* The next part_bytes of the pieces, or what is left of them. */
static int cut(struct iovec **pieces, int *piece_count, uint64_t part_bytes, struct iovec *parts, uint64_t *cut_bytes)
{
    int part_count = 0;
    *cut_bytes = 0;
    while (*piece_count > 0 && part_count < PARTS_MAX && *cut_bytes < part_bytes) {
        struct iovec *piece = *pieces;
        uint64_t left_bytes = part_bytes - *cut_bytes, taken_bytes = piece->iov_len < left_bytes ? piece->iov_len : left_bytes;
        parts[part_count++] = (struct iovec){piece->iov_base, taken_bytes};
        piece->iov_base = (char *)piece->iov_base + taken_bytes;
        piece->iov_len -= taken_bytes;
        *cut_bytes += taken_bytes;
        if (piece->iov_len == 0) {
            ++*pieces;
            --*piece_count;
        }
    }
    return part_count;
}

bool paced_send(struct paced *paced, struct paced_link *link, struct channel *channel, struct iovec *pieces, int piece_count,
                int stop_fd, struct loop_result *result)
{
    while (piece_count > 0) {
        struct iovec parts[PARTS_MAX];
        uint64_t sent_bytes, part_bytes = wait_for_turn(paced, link, channel, stop_fd, result);
        if (part_bytes == 0)
            return false;
        int part_count = cut(&pieces, &piece_count, part_bytes, parts, &sent_bytes);
        if (!channel_send_all(channel, parts, part_count, stop_fd, result))
            return false;
        note_sent(paced, link, channel, sent_bytes);
    }
    return true;
}
