/* huge-urgent and huge-stream: pages of 2 MiB on hugetlbfs, in the fewest system calls.
 *   huge-urgent  guest: first touch ── destination: read(uffd), send 8 bytes, recv the page in place, CONTINUE ── guest runs on
 *   huge-stream  source: send page after page ── destination: recv a page in place, CONTINUE
 * In place is through an alias that was filled before the clock starts, as the product's memory is when its guest is accepted. No page
 * table is missing then, so the copy out of the socket is the only one, and it runs beside the source's copy into it.
 * What this floor need not do and the product must: find out zero pages, keep a page that is half here from being read (the second
 * copy, out of a buffer), bring one page by two connections, answer a small page between. */
#include "floor.h"
#include "histogram.h"

#include <string.h>
#include <sys/mman.h>

static int is_stream(const struct floor_world *world)
{
    return strcmp(world->options.scenario, "huge-stream") == 0;
}

static void guest(struct floor_world *world)
{
    struct floor_memory memory;
    struct floor_report *report = world->report;
    char byte;
    floor_guest_create(world, &memory);
    floor_check(floor_receive(world->guest_end[0], &byte, 1) == 1, "the word to start, or the end of the stream");
    for (uint64_t page = 0; page < world->pages; page++) {
        const volatile uint64_t *words = (const volatile uint64_t *)(memory.mapping + page * world->page_bytes);
        uint64_t began_ns = clock_monotonic_ns(), value = *words;
        if (!is_stream(world))
            report->latency_ns[report->count++] = clock_monotonic_ns() - began_ns;
        uint64_t last = world->page_bytes / sizeof value - 1;
        floor_check(value == floor_page_word(world, page) && words[last] == value + last, "the content of a page");
    }
    report->touched = world->pages;
    floor_send(world->guest_end[0], "e", 1, 0);
}

static void source(struct floor_world *world)
{
    unsigned char *memory = floor_source_memory(world);
    int socket_fd = floor_accept(world->listener);
    char byte;
    floor_send(socket_fd, "r", 1, 0);
    if (is_stream(world)) {
        floor_check(floor_receive(socket_fd, &byte, 1) == 1, "the start of the stream");
        for (uint64_t page = 0; page < world->pages; page++)
            floor_send(socket_fd, memory + page * world->page_bytes, world->page_bytes, 0);
    }
    for (uint64_t page; floor_receive(socket_fd, &page, sizeof page) != 0;) {
        floor_check(page < world->pages, "the page asked for");
        floor_send(socket_fd, memory + page * world->page_bytes, world->page_bytes, 0);
    }
}

static void stream(struct floor_world *world, struct floor_memory *memory, unsigned char *alias, int socket_fd)
{
    uint64_t began_ns = clock_monotonic_ns();
    floor_send(socket_fd, "s", 1, 0);
    for (uint64_t page = 0; page < world->pages; page++) {
        floor_check(floor_receive(socket_fd, alias + page * world->page_bytes, world->page_bytes) != 0, "a page");
        floor_continue(memory, page, 1);
    }
    world->report->stream_ns = clock_monotonic_ns() - began_ns;
    floor_send(world->daemon_end[0], "e", 1, 0);
}

static void answer_faults(struct floor_world *world, struct floor_memory *memory, unsigned char *alias, int socket_fd)
{
    floor_send(world->daemon_end[0], "g", 1, 0);
    for (uint64_t answered = 0; answered < world->pages; answered++) { /* one thread touches each page once */
        uint64_t page = floor_read_fault(memory);
        world->report->events++;
        floor_send(socket_fd, &page, sizeof page, 0);
        floor_check(floor_receive(socket_fd, alias + page * world->page_bytes, world->page_bytes) != 0, "the page asked for");
        floor_continue(memory, page, 1);
    }
}

static void destination(struct floor_world *world)
{
    struct floor_memory memory;
    size_t size_bytes = world->pages * world->page_bytes;
    char byte;
    floor_guest_adopt(world, &memory);
    unsigned char *alias = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, memory.memfd, 0);
    floor_expect(alias != MAP_FAILED, "the alias mapping");
    int socket_fd = floor_connect(world);
    floor_check(floor_receive(socket_fd, &byte, 1) == 1, "a source that is ready");
    if (is_stream(world))
        stream(world, &memory, alias, socket_fd);
    else
        answer_faults(world, &memory, alias, socket_fd);
    floor_check(floor_receive(world->daemon_end[0], &byte, 1) == 1, "the guest's end");
}

void floor_huge(struct floor_world *world)
{
    floor_start("source", source, world);
    floor_start("destination", destination, world);
    floor_start("guest", guest, world);
}
