/* Whatever the agent's end of the socket says to the object that is preloaded into QEMU: its thread's own loop, with memory that is
 * registered for real and a pagemap. It ends with the input; that it would end QEMU then is noted instead.
 *
 *   each datagram   a byte: bits 0-3 how long it is (4 is a command), bit 7: the command is byte & 3; else as many bytes of the input */
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "fuzz.h"
#include "mapping.h"

static int signals[2];
static size_t signalled;

static int note_signal(int number)
{
    CHECK(signalled < 2);
    signals[signalled++] = number;
    return 0;
}

#define kill(pid, number) note_signal(number)
#define poll(descriptors, count, ms) ((void)(ms))
#include "../../migrate/guests/qemu/preload.c"
#undef kill
#undef poll

#define MEMORY_BYTES (16u * 4096)
#define DATAGRAMS_MAX 48 /* so many reports that nobody has read yet have room */

/* What must come of it. */
struct expected {
    uint32_t reports;
    bool tracks, whole;
};

static void make_once(void)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    void *guest = mapping_reserve(MEMORY_BYTES);
    CHECK(fd >= 0 && ftruncate(fd, MEMORY_BYTES) == 0 && guest && mapping_place(guest, MEMORY_BYTES, fd, 0) == 0);
    state.address = (uintptr_t)guest;
    state.size_bytes = MEMORY_BYTES;
}

static struct expected say(int socket_fd, struct taker *taker)
{
    struct expected expected = {0};
    for (uint32_t i = 0; i < DATAGRAMS_MAX && taker->left_bytes > 0; i++) {
        uint8_t how = take(taker), bytes[16] = {0};
        size_t size_bytes = how & 0x80 ? sizeof(uint32_t) : how & 0x0f;
        uint32_t command = how & 3;
        for (size_t at = 0; at < size_bytes; at++)
            bytes[at] = how & 0x80 ? 0 : take(taker);
        if (how & 0x80)
            memcpy(bytes, &command, sizeof(command));
        if (size_bytes == 0)
            continue; /* the end, as recv(2) tells it */
        CHECK(send(socket_fd, bytes, size_bytes, MSG_NOSIGNAL) == (ssize_t)size_bytes);
        memcpy(&command, bytes, sizeof(command));
        if (size_bytes != sizeof(command))
            continue;
        expected.reports += command == PRELOAD_TRACK;
        expected.tracks = command == PRELOAD_TRACK || (expected.tracks && command != PRELOAD_UNTRACK);
        expected.whole = expected.whole || command == PRELOAD_WHOLE;
    }
    return expected;
}

/* One for each command to track, with a pagemap where it could be. Gives whether the last one could. */
static bool read_reports(int socket_fd, uint32_t wanted)
{
    bool tracks = false;
    for (uint32_t i = 0; i < wanted; i++) {
        struct preload_report message;
        struct iovec part = {.iov_base = &message, .iov_len = sizeof(message)};
        union {
            struct cmsghdr header;
            char room[CMSG_SPACE(sizeof(int))];
        } control;
        struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
        CHECK(recvmsg(socket_fd, &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) == sizeof(message) && message.kind == PRELOAD_TRACKING);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        tracks = message.error_number == 0;
        CHECK(tracks == (rights != NULL) && memchr(message.step, 0, sizeof(message.step)) != NULL);
        if (rights) {
            int fd;
            memcpy(&fd, CMSG_DATA(rights), sizeof(fd));
            close(fd);
        }
    }
    uint8_t more;
    CHECK(recv(socket_fd, &more, 1, MSG_DONTWAIT) <= 0);
    return tracks;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    int sockets[2], first_free = dup(0), arriving_fd;
    if (state.size_bytes == 0)
        make_once();
    close(first_free);
    first_free = dup(0); /* the memory file has taken one */
    close(first_free);
    CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets) == 0 && (arriving_fd = dup(0)) >= 0);
    state.socket_fd = sockets[0];
    state.arriving_fd = arriving_fd;
    signalled = 0;
    struct taker taker = {data, size_bytes};
    struct expected expected = say(sockets[1], &taker);
    CHECK(shutdown(sockets[1], SHUT_WR) == 0);
    serve_agent(NULL);
    CHECK(signalled == 2 && signals[0] == SIGTERM && signals[1] == SIGKILL);
    bool could_track = read_reports(sockets[1], expected.reports);
    CHECK((state.tracking_fd >= 0) <= expected.tracks && (state.tracking_fd >= 0 || !expected.tracks || !could_track));
    CHECK((state.arriving_fd < 0) == expected.whole);
    let_go(&state.tracking_fd);
    let_go(&state.arriving_fd);
    close(sockets[0]);
    close(sockets[1]);
    int free_now = dup(0);
    CHECK(free_now == first_free); /* nothing has been left open */
    close(free_now);
    return 0;
}
