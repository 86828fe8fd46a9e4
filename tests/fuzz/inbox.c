/* Whatever a source sends, on either data connection and in each phase, to a destination that is real but for its guest: memory files,
 * aliases, a userfaultfd, pages of 4 KiB and large ones that come in pieces (on a memfd: their size is what matters here).
 *
 *   byte 0   bits 0-1 the phase, 2 the urgent connection, 3 the guest has been resumed here, 4 it is another epoch
 *   byte 1   how long the parts are in which the stream comes
 *   then     the stream (wire.h), and what was asked for: pages that a fault waits for, from the same bytes
 *
 * Afterwards every page is in a state that there is, as many are final as are said to be, and nothing is in the file beyond the regions. */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "inbox.h"
#include "kernel.h"
#include "mapping.h"
#include "uffd.h"
#include "wire.h"

#define SMALL_PAGES 24
#define LARGE_PAGES 2
#define LARGE_BYTES (2u << 20)

static struct memory_region regions[2];
static int userfaultfd = -1;

static int memory_file(uint64_t size_bytes)
{
    int fd = memfd_create("fuzz", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)size_bytes) == 0);
    return fd;
}

static void region_make(struct memory_region *region, uint64_t page_count, uint32_t page_bytes)
{
    uint64_t size_bytes = page_count * page_bytes, ioctls;
    void *guest = mapping_reserve(size_bytes);
    *region = (struct memory_region){.guest_address = (uint64_t)(uintptr_t)guest, .size_bytes = size_bytes, .page_bytes = page_bytes,
                                     .memory_fd = memory_file(size_bytes)};
    CHECK(guest && mapping_place(guest, size_bytes, region->memory_fd, 0) == 0);
    CHECK(uffd_register(userfaultfd, region->guest_address, size_bytes, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR,
                        &ioctls) == 0);
}

static void make_once(void)
{
    struct uffd_opened opened;
    uint64_t features = UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM;
    uffd_open(1, &opened);
    CHECK(opened.fd >= 0 && uffd_api(opened.fd, &features) == 0);
    userfaultfd = opened.fd;
    region_make(&regions[0], SMALL_PAGES, 4096);
    region_make(&regions[1], LARGE_PAGES, LARGE_BYTES);
}

static bool is_final(enum page_state state)
{
    return state == PAGE_PRESENT || state == PAGE_MAPPED || state == PAGE_ZERO || state == PAGE_REMOVED;
}

static void check(struct destination *destination, const struct loop_result *result)
{
    uint64_t final = 0;
    for (uint64_t page = 0; page < destination->memory.page_total; page++) {
        enum page_state state = PAGE_STATE(page_load(&destination->state[page]));
        bool large = page >= SMALL_PAGES;
        CHECK(state <= PAGE_REMOVED && (state != PAGE_RECEIVING || large)); /* no claim is held across a wait for the network (P1) */
        final += is_final(state);
    }
    CHECK(atomic_load(&destination->pages_final) == final);
    CHECK(result->reason == LOOP_STOPPED || result->reason == LOOP_FRAME_INVALID || result->reason == LOOP_PAGE_UNASKED ||
          result->reason == LOOP_PAGE_DUPLICATE || result->reason == LOOP_PEER_CLOSED);
    for (uint32_t r = 0; r < 2; r++) {
        struct stat status;
        CHECK(fstat(regions[r].memory_fd, &status) == 0 && (uint64_t)status.st_size == regions[r].size_bytes);
    }
}

/* As the fault loop would have: some pages were asked for. */
static void ask(struct destination *destination, const uint8_t *data, size_t size_bytes)
{
    for (size_t i = 0; i + 1 < size_bytes && i < 8; i++) {
        uint64_t page = data[i] % destination->memory.page_total;
        page_want(&destination->state[page]);
        if (!(atomic_fetch_or(&destination->copies[page], COPY_ASKED) & COPY_ASKED))
            atomic_fetch_add(&destination->requests_outstanding, 1);
    }
}

/* Nobody reads what comes back; there is room for it. */
static void feed(struct destination *destination, struct inbox *inbox, int socket, const struct wire *wire, size_t part_bytes,
                 struct loop_result *result)
{
    for (size_t sent_bytes = 0; sent_bytes < wire->size_bytes;) {
        size_t left_bytes = wire->size_bytes - sent_bytes;
        ssize_t taken_bytes = send(socket, wire->bytes + sent_bytes, left_bytes < part_bytes ? left_bytes : part_bytes, MSG_DONTWAIT);
        sent_bytes += taken_bytes > 0 ? (size_t)taken_bytes : 0;
        enum inbox_phase before = inbox->phase;
        if (!inbox_take(inbox, destination, result))
            return;
        if (inbox->phase == INBOX_MARKED && before != INBOX_MARKED) { /* the guest is resumed here: receive.c */
            inbox->phase = INBOX_STALE;
            destination_open(destination);
            if (!inbox_take_buffered(inbox, destination, result))
                return;
        }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size_bytes)
{
    static struct wire wire;
    if (userfaultfd < 0)
        make_once();
    struct taker taker = {data, size_bytes};
    uint8_t how = take(&taker), part = take(&taker);
    int error_number = 0, sockets[2];
    struct destination *destination = destination_create(regions, 2, userfaultfd, &error_number);
    CHECK(destination && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    struct loop_result result = {0};
    struct inbox inbox;
    enum page_path path = how & 4 ? PATH_URGENT : PATH_BULK;
    CHECK(inbox_init(&inbox, destination, sockets[0], path) == 0);
    inbox.phase = path == PATH_URGENT ? INBOX_FINAL : (enum inbox_phase[]){INBOX_FINAL, INBOX_PRECOPY, INBOX_STALE, INBOX_PRECOPY}[how & 3];
    if (how & 8 && inbox.phase != INBOX_PRECOPY)
        destination_open(destination);
    if (inbox.phase == INBOX_FINAL)
        ask(destination, taker.data, taker.left_bytes);
    wire_make(&wire, &taker);
    feed(destination, &inbox, sockets[1], &wire, part ? (size_t)part * 97 : WIRE_BYTES_MAX, &result);
    if (how & 16) {
        destination_next_epoch(destination);
        CHECK(atomic_load(&destination->requests_outstanding) == 0);
    }
    check(destination, &result);
    inbox_deinit(&inbox);
    close(sockets[0]);
    close(sockets[1]);
    destination_destroy(destination);
    for (uint32_t r = 0; r < 2; r++)
        CHECK(fallocate(regions[r].memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)regions[r].size_bytes) == 0);
    return 0;
}
