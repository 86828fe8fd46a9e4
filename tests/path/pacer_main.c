/* The pacer alone: pacer-main SCENARIO... Its controller on a simulated link, deterministic; and what it is built into (paced.h) on
 * connections over loopback, with several threads.
 *
 * The link: a token bucket in front of a queue, as tbf is, behind a socket that spreads pieces at the rate it is told. Time goes in
 * steps of 10 us. What is measured is what the promises say: the share of the link that bulk gets, and how long the queue is that
 * an urgent page would wait in. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "histogram.h"
#include "paced.h"
#include "../check.h"

#define US UINT64_C(1000)
#define MS UINT64_C(1000000)
#define SECOND UINT64_C(1000000000)
#define STEP_NS (10 * US)
#define MBIT UINT64_C(125000) /* bytes a second */

/* Bytes that left in a step, until they are acknowledged. */
#define TRACKS (1u << 17)

struct link {
    uint64_t capacity_bytes, base_ns, bucket_bytes; /* a second; round trip of an empty link; what the shaper lets through at once */
    double tokens, queue, socket;                   /* bytes */
    double left[TRACKS];                            /* by step */
    uint64_t sent_bytes, acked_bytes, rtt_ns, starved_ns, now_ns;
    uint64_t sampled_ns, sampled_acked_bytes, sampled_starved_ns;
    uint64_t stalled_until_ns; /* acknowledgements come in a bunch then */
    uint64_t asleep_until_ns;  /* the sender is kept from the CPU */
    double held;
    bool starving;             /* the receiver is the slowest, and has no room */
    double window_bytes, socket_bytes; /* what TCP lets be on its way; what the socket takes */
    bool full;                 /* the socket: it takes more when a third of it is free */
    uint64_t blocked_ns;       /* the sender, for that */
    uint64_t look_ns;          /* from one sample to the next */
    struct pacer pacer;
    uint64_t steps, steps_late; /* with more than 150 us of queue, and a page on top */
    double queue_most_ns;
};

static void link_begin(struct link *link, uint64_t capacity_bytes)
{
    memset(link, 0, sizeof(*link));
    *link = (struct link){.capacity_bytes = capacity_bytes, .base_ns = 50 * US, .bucket_bytes = 64 << 10, .now_ns = SECOND, .rtt_ns = 50 * US,
                          .window_bytes = 1e9, .socket_bytes = 4 << 20, .look_ns = 250 * US};
    link->tokens = (double)link->bucket_bytes;
    pacer_init(&link->pacer);
}

static double on_the_way(const struct link *link)
{
    return (double)(link->sent_bytes - link->acked_bytes) - link->socket;
}

static void send_pieces(struct link *link)
{
    if (link->full && link->socket > link->socket_bytes / 3 * 2)
        return;
    link->full = false;
    while (!link->full && pacer_wait_ns(&link->pacer, link->now_ns) == 0) {
        uint64_t piece_bytes = pacer_piece_bytes(&link->pacer);
        link->socket += (double)piece_bytes;
        link->sent_bytes += piece_bytes;
        pacer_sent(&link->pacer, link->now_ns, piece_bytes);
        link->full = link->socket >= link->socket_bytes;
    }
}

static double least(double a, double b)
{
    return a < b ? a : b;
}

static double most(double a, double b)
{
    return a > b ? a : b;
}

/* Out of the socket, through the shaper; what leaves it is acknowledged a round trip later. */
static void move_bytes(struct link *link)
{
    double step_seconds = (double)STEP_NS / 1e9;
    uint64_t smooth_rate = pacer_smooth_rate(&link->pacer);
    double spread = smooth_rate ? (double)smooth_rate * step_seconds : link->socket, room = 6e6 - link->queue;
    double moved = least(least(spread, link->socket), least(room, most(link->window_bytes - on_the_way(link), 0)));
    link->socket -= moved;
    link->queue += moved;
    link->tokens = least(link->tokens + (double)link->capacity_bytes * step_seconds, (double)link->bucket_bytes);
    double left = least(link->queue, link->tokens);
    link->queue -= left;
    link->tokens -= left;
    uint64_t step = link->now_ns / STEP_NS;
    link->left[step % TRACKS] = left;
    double *acked = &link->left[(step - link->base_ns / STEP_NS) % TRACKS], arrived = *acked + link->held;
    *acked = 0; /* once, also when the way becomes longer */
    uint64_t acked_bytes = link->now_ns < link->stalled_until_ns ? 0 : (uint64_t)arrived;
    link->held = arrived - (double)acked_bytes;
    if (acked_bytes == 0)
        return;
    link->acked_bytes += acked_bytes;
    uint64_t delay_ns = link->base_ns + (uint64_t)(link->queue / (double)link->capacity_bytes * 1e9);
    link->rtt_ns = (7 * link->rtt_ns + delay_ns) / 8;
}

static void sample(struct link *link)
{
    if (link->now_ns - link->sampled_ns < link->look_ns)
        return;
    uint64_t elapsed_ns = link->now_ns - link->sampled_ns;
    struct pacer_sample sample = {
        .now_ns = link->now_ns,
        .rtt_ns = link->starving ? 800 * US : link->rtt_ns,
        .unacked_bytes = on_the_way(link) > 0 ? (uint64_t)on_the_way(link) : 0,
        .acked_bytes = link->acked_bytes - link->sampled_acked_bytes,
        .starved_ns = link->starving ? elapsed_ns * 3 / 4 : 0,
        .blocked_ns = link->blocked_ns,
    };
    link->blocked_ns = 0;
    link->sampled_ns = link->now_ns;
    link->sampled_acked_bytes = link->acked_bytes;
    pacer_sample(&link->pacer, &sample);
}

static void step(struct link *link)
{
    if (link->now_ns >= link->asleep_until_ns) {
        uint64_t before_bytes = link->sent_bytes;
        send_pieces(link);
        if (link->sent_bytes != before_bytes) /* it looks when it has sent */
            sample(link);
    }
    move_bytes(link);
    link->blocked_ns += link->full ? STEP_NS : 0;
    double queue_ns = link->queue / (double)link->capacity_bytes * 1e9;
    link->steps++;
    link->steps_late += queue_ns > 150e3 + 4096e9 / (double)link->capacity_bytes;
    if (queue_ns > link->queue_most_ns)
        link->queue_most_ns = queue_ns;
    link->now_ns += STEP_NS;
}

/* Runs on; the share of the link that was acknowledged. */
static double run_for(struct link *link, uint64_t span_ns)
{
    uint64_t before_bytes = link->acked_bytes, until_ns = link->now_ns + span_ns;
    link->steps = link->steps_late = 0;
    link->queue_most_ns = 0;
    while (link->now_ns < until_ns)
        step(link);
    return (double)(link->acked_bytes - before_bytes) / ((double)link->capacity_bytes * (double)span_ns / 1e9);
}

static double late_share(const struct link *link)
{
    return (double)link->steps_late / (double)link->steps;
}

static struct link simulated; /* megabytes */

/* From the first byte on: within 100 ms at the rate, and it is late for at most 2 % of the time. */
static void finds(void)
{
    for (uint64_t capacity = 20 * MBIT; capacity <= 2560 * MBIT; capacity *= 2) {
        link_begin(&simulated, capacity);
        run_for(&simulated, 200 * MS);
        CHECK(simulated.pacer.mode != PACER_OPEN);
        CHECK(run_for(&simulated, 5 * SECOND) >= 0.9);
        CHECK(late_share(&simulated) <= 0.02);
    }
    link_begin(&simulated, 1000 * MBIT);
    run_for(&simulated, 200 * MS);
    CHECK(simulated.queue_most_ns < 10e6); /* while it looked for the rate */
    CHECK(late_share(&simulated) < 0.1);
}

/* Twice as fast, half as fast, a tenth: within a second it is followed. */
static void follows(void)
{
    static const uint64_t capacities[] = {1000 * MBIT, 500 * MBIT, 1000 * MBIT, 2000 * MBIT, 200 * MBIT, 1000 * MBIT};
    link_begin(&simulated, capacities[0]);
    for (size_t i = 0; i < sizeof(capacities) / sizeof(capacities[0]); i++) {
        simulated.capacity_bytes = capacities[i];
        run_for(&simulated, 1500 * MS);
        CHECK(run_for(&simulated, SECOND) >= 0.9);
        CHECK(late_share(&simulated) <= 0.02);
    }
}

/* A window so small that the socket fills up before a queue stands for long: the sender looks a few times, and then not
 * for as long as the socket is full. */
static void full_socket(void)
{
    link_begin(&simulated, 400 * MBIT);
    simulated.window_bytes = 46000;
    simulated.socket_bytes = 300000;
    simulated.look_ns = 1100 * US;
    run_for(&simulated, 200 * MS);
    CHECK(pacer_rate(&simulated.pacer) > 300 * MBIT);
    simulated.capacity_bytes = 100 * MBIT;
    run_for(&simulated, 1500 * MS);
    CHECK(pacer_rate(&simulated.pacer) < 100 * MBIT);
    CHECK(run_for(&simulated, SECOND) >= 0.9);
    CHECK(late_share(&simulated) <= 0.05);
}

/* Threads that sleep too long, acknowledgements that are held up: not a bottleneck. */
static void hiccups(void)
{
    uint64_t random = 88172645463325252u;
    link_begin(&simulated, 1000 * MBIT);
    run_for(&simulated, 500 * MS);
    double share = 0;
    for (int i = 0; i < 100; i++) {
        random ^= random << 13, random ^= random >> 7, random ^= random << 17;
        if (i % 2)
            simulated.asleep_until_ns = simulated.now_ns + random % (4 * MS);
        else
            simulated.stalled_until_ns = simulated.now_ns + random % (4 * MS);
        share += run_for(&simulated, 50 * MS) / 100;
    }
    CHECK(share >= 0.85);
}

/* No bottleneck, but a receiver that copies: the round trip stands at 0.8 ms, and bulk goes as fast as it can. */
static void open_path(void)
{
    link_begin(&simulated, 2000000000);
    run_for(&simulated, 20 * MS);
    CHECK(simulated.pacer.mode == PACER_OPEN && pacer_rate(&simulated.pacer) == 0);
    simulated.capacity_bytes = 300000000; /* so slow is it at times */
    simulated.starving = true;
    run_for(&simulated, SECOND);
    CHECK(simulated.pacer.mode == PACER_OPEN);
    simulated.starving = false; /* and now it is the path */
    run_for(&simulated, 300 * MS);
    CHECK(simulated.pacer.mode != PACER_OPEN);
    CHECK(run_for(&simulated, SECOND) >= 0.9);
}

/* The way becomes longer: that does not go away by waiting, and bulk does not starve for it. */
static void longer_path(void)
{
    link_begin(&simulated, 1000 * MBIT);
    run_for(&simulated, SECOND);
    simulated.base_ns = 5 * MS;
    run_for(&simulated, SECOND);
    CHECK(run_for(&simulated, SECOND) >= 0.85);
}

static void limited(void)
{
    link_begin(&simulated, 1000 * MBIT);
    pacer_limit(&simulated.pacer, 10000000, simulated.now_ns);
    uint64_t before_bytes = simulated.sent_bytes;
    run_for(&simulated, SECOND);
    uint64_t sent_bytes = simulated.sent_bytes - before_bytes;
    CHECK(sent_bytes > 9900000 && sent_bytes < 10100000);
    pacer_limit(&simulated.pacer, 1000, simulated.now_ns); /* two seconds a piece */
    run_for(&simulated, SECOND);
    CHECK(pacer_wait_ns(&simulated.pacer, simulated.now_ns) == 100 * MS); /* looks again */
    pacer_limit(&simulated.pacer, 0, simulated.now_ns);
    CHECK(pacer_wait_ns(&simulated.pacer, simulated.now_ns) == 0);
    run_for(&simulated, SECOND);
    CHECK(run_for(&simulated, SECOND) >= 0.9); /* below the limit it has found nothing, and now it has */
    pacer_limit(&simulated.pacer, 1000 * MBIT * 10, simulated.now_ns);
    CHECK(pacer_rate(&simulated.pacer) < 1000 * MBIT); /* the controller's is the lower one */
}

/* --- with sockets and threads -------------------------------------------------------------------------------------------- */

#define SENDERS 3
#define SENT_BYTES (1u << 20)

struct sender {
    struct paced *paced;
    int socket, stop_fd;
    bool sent;
    struct loop_result result;
    pthread_t thread;
};

static void connect_pair(int *here, int *there)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t address_bytes = sizeof(address);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    *here = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(bind(listener, (struct sockaddr *)&address, address_bytes) == 0 && listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &address_bytes) == 0);
    CHECK(connect(*here, (struct sockaddr *)&address, address_bytes) == 0);
    *there = accept(listener, NULL, NULL);
    CHECK(*there >= 0);
    close(listener);
}

static void *run_sender(void *of)
{
    struct sender *sender = of;
    struct channel channel = {.socket = sender->socket};
    struct paced_link link = {0};
    unsigned char *bytes = malloc(SENT_BYTES), header[24];
    memset(header, 0xaa, sizeof(header));
    for (uint32_t i = 0; i < SENT_BYTES; i++)
        bytes[i] = (unsigned char)(i * 2654435761u >> 24);
    struct iovec pieces[2] = {{header, sizeof(header)}, {bytes, SENT_BYTES}};
    sender->sent = paced_send(sender->paced, &link, &channel, pieces, 2, sender->stop_fd, &sender->result);
    paced_leave(sender->paced, &link, &channel);
    free(bytes);
    shutdown(sender->socket, SHUT_WR);
    return NULL;
}

static void check_received(int socket)
{
    uint64_t position = 0;
    unsigned char bytes[4096];
    for (ssize_t got; (got = recv(socket, bytes, sizeof(bytes), 0)) > 0;)
        for (ssize_t i = 0; i < got; i++, position++)
            CHECK(bytes[i] == (position < 24 ? 0xaa : (unsigned char)((uint32_t)(position - 24) * 2654435761u >> 24)));
    CHECK(position == 24 + SENT_BYTES);
}

/* One limit over all connections, changed meanwhile; every byte in order. Then all are told to stop while they wait. */
static void threads(void)
{
    struct paced paced;
    _Atomic uint64_t waited_ns = 0;
    struct sender senders[SENDERS];
    int there[SENDERS], stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    paced_init(&paced, &waited_ns);
    for (int stopped = 0; stopped < 2; stopped++) {
        paced_limit(&paced, stopped ? 1 : 8u << 20);
        uint64_t began_ns = clock_monotonic_ns();
        for (int i = 0; i < SENDERS; i++) {
            senders[i] = (struct sender){.paced = &paced, .stop_fd = stop_fd};
            connect_pair(&senders[i].socket, &there[i]);
            CHECK(pthread_create(&senders[i].thread, NULL, run_sender, &senders[i]) == 0);
        }
        if (stopped)
            eventfd_write(stop_fd, 1);
        for (int i = 0; i < SENDERS && !stopped; i++)
            check_received(there[i]);
        uint64_t took_ns = clock_monotonic_ns() - began_ns;
        CHECK(stopped || took_ns > SENDERS * SECOND / 8 * 9 / 10); /* together, at 8 MiB a second */
        for (int i = 0; i < SENDERS; i++) {
            CHECK(pthread_join(senders[i].thread, NULL) == 0);
            CHECK(senders[i].sent == !stopped && (!stopped || senders[i].result.reason == LOOP_STOPPED));
            close(senders[i].socket);
            close(there[i]);
        }
    }
    CHECK(waited_ns > 0 && paced.unacked_bytes == 0);
    CHECK(paced_rate(&paced) == 1);
    paced_deinit(&paced);
    close(stop_fd);
}

/* No TCP: nothing is known of its path, and nothing is in its way. */
static void blind(void)
{
    struct paced paced;
    _Atomic uint64_t waited_ns = 0;
    int pair[2], stop_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) == 0);
    paced_init(&paced, &waited_ns);
    char byte = 1;
    struct iovec piece = {&byte, 1};
    struct paced_link link = {0};
    struct channel channel = {.socket = pair[0]};
    struct loop_result result;
    CHECK(paced_send(&paced, &link, &channel, &piece, 1, stop_fd, &result));
    CHECK(paced_rate(&paced) == 0);
    paced_deinit(&paced);
    paced_init(&paced, &waited_ns);
    CHECK(paced_rate(&paced) != 0);
    paced_never(&paced); /* --no-pacing: the same, and a limit still holds */
    CHECK(paced_rate(&paced) == 0);
    paced_limit(&paced, 5);
    CHECK(paced_rate(&paced) == 5);
    paced_deinit(&paced);
    close(pair[0]);
    close(pair[1]);
    close(stop_fd);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } scenarios[] = {{"finds", finds},   {"follows", follows}, {"full-socket", full_socket}, {"hiccups", hiccups}, {"open-path", open_path}, {"longer-path", longer_path},
                     {"limited", limited}, {"threads", threads}, {"blind", blind}};
    for (int i = 1; i < argc; i++) {
        bool known = false;
        for (size_t s = 0; s < sizeof(scenarios) / sizeof(scenarios[0]); s++)
            if (strcmp(argv[i], scenarios[s].name) == 0) {
                known = true;
                scenarios[s].run();
                printf("%s: held\n", argv[i]);
                fflush(stdout);
            }
        CHECK(known);
    }
    return 0;
}
