/* The bytes of TLS sessions behind channel.h, without Python: `tls-main FILES SCENARIO...`, FILES a directory with cert.pem, key.pem
 * and ca.pem. It ends with status 0 when each has held. */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "channel.h"
#include "tls.h"
#include "../check.h"

#define REKEY_BYTES (100u << 10)
#define TOTAL_BYTES (32u << 20)
#define DEADLINE_MS 10000
#define PONGS 2000

struct end {
    struct tls_session *session;
    int socket;
    int stop_fd;
};

struct link {
    struct tls_context *context;
    struct end end[2];
};

static uint8_t byte_at(uint64_t at)
{
    return (uint8_t)(at * 2654435761u >> 13);
}

static void tcp_pair(int sockets[2])
{
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t address_bytes = sizeof(address);
    CHECK(bind(listener, (struct sockaddr *)&address, sizeof(address)) == 0 && listen(listener, 1) == 0);
    CHECK(getsockname(listener, (struct sockaddr *)&address, &address_bytes) == 0);
    sockets[0] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    CHECK(connect(sockets[0], (struct sockaddr *)&address, sizeof(address)) == 0);
    sockets[1] = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    CHECK(sockets[1] >= 0);
    close(listener);
}

static void *shake(void *argument)
{
    struct end *end = argument;
    char why[TLS_WHY_BYTES], names[256];
    enum tls_outcome outcome = tls_handshake(end->session, DEADLINE_MS, why);
    if (outcome != TLS_DONE)
        fprintf(stderr, "handshake: %d %s\n", outcome, why);
    CHECK(outcome == TLS_DONE);
    CHECK(tls_peer_names(end->session, names, sizeof(names)) > 0);
    CHECK(tls_peer_names(end->session, names, 4) == 0); /* does not fit */
    return NULL;
}

static void link_open(struct link *link, const char *files, const int sockets[2])
{
    char certificate[512], key[512], authority[512], why[TLS_WHY_BYTES];
    snprintf(certificate, sizeof(certificate), "%s/cert.pem", files);
    snprintf(key, sizeof(key), "%s/key.pem", files);
    snprintf(authority, sizeof(authority), "%s/ca.pem", files);
    link->context = tls_context_create(certificate, key, authority, why);
    CHECK(link->context);
    tls_context_rekey(link->context, REKEY_BYTES);
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        link->end[i] = (struct end){tls_session_create(link->context, sockets[i], i == 1), sockets[i], eventfd(0, EFD_CLOEXEC)};
        CHECK(link->end[i].session && link->end[i].stop_fd >= 0);
    }
    for (int i = 0; i < 2; i++)
        CHECK(pthread_create(&threads[i], NULL, shake, &link->end[i]) == 0);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
}

static void link_close(struct link *link)
{
    for (int i = 0; i < 2; i++) {
        if (link->end[i].session)
            tls_session_destroy(link->end[i].session);
        close(link->end[i].socket);
        close(link->end[i].stop_fd);
    }
    tls_context_destroy(link->context);
}

/* In pieces of every length, with the keys changed many times on the way. */
static void *send_much(void *argument)
{
    struct end *end = argument;
    struct channel channel = channel_of(end->socket);
    static uint8_t payload[3][200000];
    struct loop_result result = {0};
    unsigned seed = 1;
    for (uint64_t at = 0; at < TOTAL_BYTES;) {
        struct iovec pieces[3];
        for (int i = 0; i < 3; i++) {
            size_t bytes = (size_t)rand_r(&seed) % (rand_r(&seed) % 4 == 0 ? sizeof(payload[i]) : 5000);
            if (bytes > TOTAL_BYTES - at)
                bytes = TOTAL_BYTES - at;
            for (size_t j = 0; j < bytes; j++)
                payload[i][j] = byte_at(at + j);
            pieces[i] = (struct iovec){payload[i], bytes};
            at += bytes;
        }
        CHECK(channel_send_all(&channel, pieces, 3, end->stop_fd, &result));
    }
    return NULL;
}

static void bytes_cross(struct link *link)
{
    struct channel channel = channel_of(link->end[1].socket);
    static uint8_t buffer[300000];
    struct loop_result result = {0};
    pthread_t sender;
    unsigned seed = 2;
    CHECK(pthread_create(&sender, NULL, send_much, &link->end[0]) == 0);
    for (uint64_t at = 0; at < TOTAL_BYTES;) {
        size_t wanted_bytes = (size_t)rand_r(&seed) % sizeof(buffer) + 1;
        if (wanted_bytes > TOTAL_BYTES - at)
            wanted_bytes = TOTAL_BYTES - at;
        CHECK(channel_expect(&channel, wanted_bytes, &result));
        CHECK(channel_wait(&channel, link->end[1].stop_fd, &result));
        ssize_t received_bytes = channel_receive(&channel, buffer, wanted_bytes, &result);
        CHECK(received_bytes >= 0);
        for (ssize_t i = 0; i < received_bytes; i++, at++)
            CHECK(buffer[i] == byte_at(at));
    }
    CHECK(!channel_has_input(&channel));
    pthread_join(sender, NULL);
}

/* As fault and serve loop do: a request that never waits, a header and a page back. */
static void *answer(void *argument)
{
    struct end *end = argument;
    struct channel channel = channel_of(end->socket);
    struct loop_result result = {0};
    char request[24], page[4096] = {1};
    for (int i = 0; i < PONGS; i++) {
        for (size_t got = 0; got < sizeof(request);) {
            CHECK(channel_wait(&channel, end->stop_fd, &result));
            ssize_t received_bytes = channel_receive(&channel, request + got, sizeof(request) - got, &result);
            CHECK(received_bytes >= 0);
            got += (size_t)received_bytes;
        }
        struct iovec pieces[2] = {{request, sizeof(request)}, {page, sizeof(page)}};
        CHECK(channel_send_all(&channel, pieces, 2, end->stop_fd, &result));
    }
    return NULL;
}

static void pages_are_asked_for(struct link *link)
{
    struct channel channel = channel_of(link->end[0].socket);
    struct loop_result result = {0};
    pthread_t answerer;
    char request[24] = "page, please", page[24 + 4096];
    CHECK(pthread_create(&answerer, NULL, answer, &link->end[1]) == 0);
    for (int i = 0; i < PONGS; i++) {
        CHECK(channel_send(&channel, request, sizeof(request), &result) == sizeof(request));
        for (size_t got = 0; got < sizeof(page);) {
            CHECK(channel_wait(&channel, link->end[0].stop_fd, &result));
            ssize_t received_bytes = channel_receive(&channel, page + got, sizeof(page) - got, &result);
            CHECK(received_bytes >= 0);
            got += (size_t)received_bytes;
        }
        CHECK(memcmp(page, request, sizeof(request)) == 0 && page[24] == 1);
    }
    pthread_join(answerer, NULL);
}

/* A socket that is full: 0, until who reads has made room, and then each byte is there once. */
static void nothing_waits(struct link *link)
{
    struct channel sender = channel_of(link->end[0].socket), receiver = channel_of(link->end[1].socket);
    struct loop_result result = {0};
    static uint8_t out[20000], in[100000];
    uint64_t sent = 0, received = 0;
    bool full = false;
    for (uint64_t total = TOTAL_BYTES / 4; received < total;) {
        size_t bytes = sizeof(out) < total - sent ? sizeof(out) : total - sent;
        for (size_t i = 0; i < bytes; i++)
            out[i] = byte_at(sent + i);
        ssize_t taken_bytes = bytes > 0 ? channel_send(&sender, out, bytes, &result) : 0;
        CHECK(taken_bytes >= 0);
        sent += (uint64_t)taken_bytes;
        if (taken_bytes > 0)
            continue;
        full = full || bytes > 0;
        ssize_t received_bytes = channel_receive(&receiver, in, sizeof(in), &result);
        CHECK(received_bytes >= 0);
        for (ssize_t i = 0; i < received_bytes; i++, received++)
            CHECK(in[i] == byte_at(received));
    }
    CHECK(full);
}

/* A connection that ends in order, or amid a record, or in which a byte was changed: what came whole is there, then a typed end. */
static void ends(const char *files, const char *how)
{
    int near[2], far[2];
    tcp_pair(near); /* we are between near[1] and far[0] */
    tcp_pair(far);
    struct link link;
    int sockets[2] = {near[0], far[1]};
    char wire[1 << 16];
    fflush(stdout);
    pid_t between = fork();
    CHECK(between >= 0);
    if (between == 0) { /* what stands between; the handshake passes */
        struct pollfd polled[2] = {{.fd = near[1], .events = POLLIN}, {.fd = far[0], .events = POLLIN}};
        close(near[0]);
        close(far[1]);
        for (;;) {
            poll(polled, 2, -1);
            for (int i = 0; i < 2; i++) {
                ssize_t got = polled[i].revents ? recv(polled[i].fd, wire, sizeof(wire), 0) : 0;
                if (polled[i].revents && got <= 0)
                    _exit(0);
                if (i == 0 && got > 9000 && strcmp(how, "changed") == 0)
                    wire[got - 100] ^= 1; /* of the last record */
                if (i == 0 && got > 9000 && strcmp(how, "cut") == 0)
                    got -= 100;
                if (got > 0 && send(polled[1 - i].fd, wire, (size_t)got, MSG_NOSIGNAL) != got)
                    _exit(1);
                if (i == 0 && got > 8000 && strcmp(how, "cut") == 0)
                    _exit(0);
            }
        }
    }
    close(near[1]);
    close(far[0]);
    link_open(&link, files, sockets);
    struct channel sender = channel_of(link.end[0].socket), receiver = channel_of(link.end[1].socket);
    struct loop_result result = {0};
    static char content[20000];
    struct iovec pieces[1] = {{content, sizeof(content)}};
    CHECK(channel_send_all(&sender, pieces, 1, link.end[0].stop_fd, &result));
    if (strcmp(how, "in-order") == 0) {
        tls_session_destroy(link.end[0].session);
        link.end[0].session = NULL;
    }
    size_t got = 0;
    for (;;) {
        CHECK(channel_wait(&receiver, link.end[1].stop_fd, &result));
        ssize_t received_bytes = channel_receive(&receiver, wire, sizeof(wire), &result);
        if (received_bytes < 0)
            break;
        got += (size_t)received_bytes;
    }
    CHECK(strcmp(how, "in-order") == 0 ? got == sizeof(content) : got < sizeof(content));
    CHECK(result.reason == (strcmp(how, "changed") == 0 ? LOOP_CONNECTION_FAILED : LOOP_PEER_CLOSED));
    CHECK(strcmp(how, "changed") != 0 || result.error_number == EBADMSG);
    CHECK(channel_receive(&receiver, wire, sizeof(wire), &result) == -1); /* and so it stays */
    link_close(&link);
    CHECK(waitpid(between, NULL, 0) == between);
}

int main(int argument_count, char **arguments)
{
    for (int i = 2; i < argument_count; i++) {
        const char *scenario = arguments[i];
        bool whole = strcmp(scenario, "cut") && strcmp(scenario, "changed") && strcmp(scenario, "in-order");
        if (!whole) {
            ends(arguments[1], scenario);
        } else {
            struct link link;
            int sockets[2];
            tcp_pair(sockets);
            link_open(&link, arguments[1], sockets);
            if (strcmp(scenario, "bytes") == 0)
                bytes_cross(&link);
            else if (strcmp(scenario, "requests") == 0)
                pages_are_asked_for(&link);
            else if (strcmp(scenario, "full") == 0)
                nothing_waits(&link);
            else
                CHECK(false);
            link_close(&link);
        }
        CHECK(tls_on(0) == NULL);
        printf("%s: held\n", scenario);
    }
    return 0;
}
