/* stream: the whole memory over one connection, in large runs, until every page is present and each non-zero one mapped.
 *   source: send a run from its mapping ── destination: recv into a hot buffer, pwrite, CONTINUE of the run
 * The destination is the bottleneck, and in it the allocation of the file's pages. Bytes per second of what was tried and not
 * kept, as a ratio to what is here (1 MiB runs, warm memory, two cores; noise about 0.03):
 *   recv straight into the alias 0.60; the same after MADV_POPULATE_WRITE of the run 0.55; memcpy from buffer to alias 0.58
 *   runs of 64 KiB 0.75, 128 KiB 0.87, 256 KiB 0.88, 512 KiB 0.97, 2 or 4 MiB 0.99; CONTINUE per 2 MiB, pwrite per 256 KiB 0.93
 *   recv of what is there, without MSG_WAITALL 0.79; SO_RCVBUF of 128 KiB to 2 MiB 0.98 to 1.02
 *   source: pread into a buffer + send 1.00 at 4 % more CPU; sendfile 0.95 at 2 % less; and splice at the destination 0.97
 *   a thread beside that allocates ahead with fallocate 0.85: it fights for the file's locks with the pwrite
 *   congestion control bbr, which paces even on loopback, 0.88; cubic 1.00
 *   UFFDIO_COPY from the buffer 1.15, but the product's way of mapping is CONTINUE
 * Allocating the file before the clock starts would give 1.8, populating the alias before 2.8: the cost moved, not saved. */
#include "floor.h"
#include "histogram.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define STREAM_RUN_BYTES (1u << 20)

static int is_zero(const unsigned char *page)
{
    const uint64_t *words = (const uint64_t *)page;
    return words[0] == 0 && memcmp(page, page + sizeof *words, PAGE_BYTES - sizeof *words) == 0;
}

void floor_stream_send(const struct floor_world *world, int socket_fd, const unsigned char *memory, uint64_t run_pages)
{
    struct floor_run run;
    for (uint64_t page = 0, end; page < world->pages; page = end) {
        int zero = is_zero(memory + page * PAGE_BYTES);
        for (end = page + 1; end < world->pages && end - page < run_pages && is_zero(memory + end * PAGE_BYTES) == zero; end++)
            ;
        run = (struct floor_run){page, (uint32_t)(end - page), zero ? RUN_ZERO : RUN_PAGES};
        floor_send(socket_fd, &run, sizeof run, zero ? 0 : MSG_MORE);
        if (!zero)
            floor_send(socket_fd, memory + page * PAGE_BYTES, (end - page) * PAGE_BYTES, 0);
    }
    run = (struct floor_run){world->pages, 0, RUN_END};
    floor_send(socket_fd, &run, sizeof run, 0);
}

/* Idle while it lasts; then it reads every non-zero page. Nobody answers faults then: a page left unmapped meets the deadline. */
static void guest(struct floor_world *world)
{
    struct floor_memory memory;
    char byte;
    floor_guest_create(world, &memory);
    floor_check(floor_receive(world->guest_end[0], &byte, 1) == 1, "the end of the stream");
    for (uint64_t page = 0; page < world->pages; page++) {
        uint64_t first = floor_page_word(world, page), last = PAGE_BYTES / sizeof first - 1;
        const uint64_t *words = (const uint64_t *)(memory.mapping + page * PAGE_BYTES);
        if (first != 0)
            floor_check(words[0] == first && words[last] == first + last, "the content of a page");
    }
}

static void source(struct floor_world *world)
{
    unsigned char *memory = floor_source_memory(world);
    int socket_fd = floor_accept(world->listener);
    char byte;
    floor_send(socket_fd, "r", 1, 0);
    floor_check(floor_receive(socket_fd, &byte, 1) == 1, "the start of the stream");
    double before_seconds = floor_cpu_seconds();
    floor_stream_send(world, socket_fd, memory, STREAM_RUN_BYTES / PAGE_BYTES);
    floor_check(floor_receive(socket_fd, &byte, 1) == 0, "the end of the connection");
    world->report->source_cpu_seconds = floor_cpu_seconds() - before_seconds;
}

static void destination(struct floor_world *world)
{
    struct floor_memory memory;
    struct floor_report *report = world->report;
    unsigned char *hot = floor_allocate(STREAM_RUN_BYTES), *arrived = floor_allocate(world->pages);
    struct floor_run run;
    char byte;
    memset(arrived, 0, world->pages);
    floor_guest_adopt(world, &memory);
    int socket_fd = floor_connect(world);
    floor_check(floor_receive(socket_fd, &byte, 1) == 1, "a source that is ready");
    floor_let_warm_memory_go(world);

    double before_seconds = floor_cpu_seconds();
    uint64_t began_ns = clock_monotonic_ns();
    floor_send(socket_fd, "s", 1, 0);
    while (floor_check(floor_receive(socket_fd, &run, sizeof run) != 0, "the stream"), run.kind != RUN_END) {
        if (run.kind == RUN_ZERO) {
            report->zero_pages += run.page_count; /* stays a hole */
        } else {
            size_t size_bytes = (size_t)run.page_count * PAGE_BYTES;
            floor_check(floor_receive(socket_fd, hot, size_bytes) != 0, "a run");
            floor_place(&memory, run.page_index, hot, size_bytes);
            floor_continue(&memory, run.page_index, run.page_count);
        }
        memset(arrived + run.page_index, 1, run.page_count);
    }
    floor_check(memchr(arrived, 0, world->pages) == NULL, "the count of pages that came");
    report->stream_ns = clock_monotonic_ns() - began_ns;
    report->destination_cpu_seconds = floor_cpu_seconds() - before_seconds;
    floor_send(world->daemon_end[0], "e", 1, 0);
}

void floor_stream(struct floor_world *world)
{
    floor_start("source", source, world);
    floor_start("destination", destination, world);
    floor_start("guest", guest, world);
}
