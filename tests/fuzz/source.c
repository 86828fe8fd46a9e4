/* Whatever a destination sends: its requests on the urgent connection, or after precopy what it says it lacks, on bulk. The source's
 * memory is holes, so that all answers are ZERO and fit into the socket; the connection ends behind the input.
 *
 *   byte 0   bit 0 the bulk connection, then the stream (wire.h) */
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "source.h"
#include "wire.h"

#define SMALL_PAGES 40000 /* more than one frame of bits */
#define LARGE_PAGES 3
#define LARGE_BYTES (2u << 20)
#define STREAM_BYTES_MAX (24u * 400) /* so many requests that their answers have room */

static struct memory_region regions[2];

static void make_once(void)
{
    regions[0] = (struct memory_region){.size_bytes = SMALL_PAGES * UINT64_C(4096), .page_bytes = 4096};
    regions[1] = (struct memory_region){.size_bytes = LARGE_PAGES * (uint64_t)LARGE_BYTES, .page_bytes = LARGE_BYTES};
    for (uint32_t r = 0; r < 2; r++) {
        regions[r].memory_fd = memfd_create("fuzz", MFD_CLOEXEC);
        CHECK(regions[r].memory_fd >= 0 && ftruncate(regions[r].memory_fd, (off_t)regions[r].size_bytes) == 0);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    static struct wire wire;
    if (regions[0].size_bytes == 0)
        make_once();
    struct taker taker = {data, size_bytes};
    bool bulk = take(&taker) & 1;
    wire_make(&wire, &taker);
    size_t sent_bytes = wire.size_bytes < STREAM_BYTES_MAX ? wire.size_bytes : STREAM_BYTES_MAX;
    int error_number = 0, sockets[2];
    struct source *source = source_create(regions, 2, &error_number);
    CHECK(source && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    CHECK(send(sockets[1], wire.bytes, sent_bytes, MSG_DONTWAIT) == (ssize_t)sent_bytes);
    CHECK(shutdown(sockets[1], SHUT_WR) == 0);
    struct loop_result result = {0};
    source_open(source);
    if (bulk) {
        struct channel channel = {.socket = sockets[0]};
        bool settled = source_settle(source, &channel, &result);
        CHECK(settled || result.reason == LOOP_FRAME_INVALID || result.reason == LOOP_PEER_CLOSED);
    } else {
        serve_loop(source, sockets[0], &result);
        CHECK(result.reason == LOOP_FRAME_INVALID || result.reason == LOOP_PEER_CLOSED);
    }
    CHECK(atomic_load(&source->pages_sent) <= source->memory.page_total);
    close(sockets[0]);
    close(sockets[1]);
    source_destroy(source);
    return 0;
}
