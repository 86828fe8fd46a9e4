/* fault-idle and fault-under-stream: the way of one page in the fewest system calls.
 *   guest: first touch ── destination: read(uffd), send 8 bytes, recv a page, pwrite, CONTINUE ── guest runs on
 *   source: recv 8 bytes, send a page from its mapping
 * Tried and not kept (p50 of fault-idle, ratio to what is here): recv straight into the alias mapping 1.01 (its page-table
 * entry costs what the second copy saves); sendfile at the source 1.00; UFFDIO_COPY from the buffer 0.98, but the
 * product's way of mapping is CONTINUE.
 * Waking threads is nearly all of it, so the run length decides the p99 beside a stream: FAULT_RUN_BYTES. */
#include "floor.h"
#include "histogram.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

/* Beside a stream many first touches find their page mapped and take far less than a microsecond; a fault takes 3.4 µs at
 * the very least (kernel alone). What lies above this stalled. */
#define STALL_NS 2000u
/* p99 of undisturbed runs: 55 to 65 µs with 64 KiB, 80 to 95 with 128, 105 to 240 with 256, 210 to 350 with 1 MiB; p50 alike. The
 * stream itself would gain a tenth from 1 MiB. */
#define FAULT_RUN_BYTES (64u << 10)

/* One byte a page says who may write it: ABSENT -> CLAIMED by compare-and-swap -> PRESENT once its bytes are in the file. */
enum { ABSENT, CLAIMED, PRESENT };

struct source {
    const struct floor_world *world;
    const unsigned char *memory;
    int urgent, bulk;
};

struct destination {
    struct floor_world *world;
    struct floor_memory memory;
    int urgent, bulk;
    _Atomic unsigned char *state;
};

static int under_stream(const struct floor_world *world)
{
    return strcmp(world->options.scenario, "fault-under-stream") == 0;
}

static pthread_t start_thread(void *(*body)(void *), void *argument)
{
    pthread_t thread;
    errno = pthread_create(&thread, NULL, body, argument);
    floor_expect(errno == 0, "pthread_create");
    return thread;
}

/* The first options.touches pages of a shuffled deck. */
static uint32_t *shuffled_pages(const struct floor_world *world)
{
    uint32_t *order = floor_allocate(world->pages * sizeof *order);
    for (uint64_t i = 0; i < world->pages; i++)
        order[i] = (uint32_t)i;
    uint64_t random = world->options.seed;
    for (uint64_t i = 0; i < world->options.touches; i++) {
        uint64_t other = i + floor_random(&random) % (world->pages - i);
        uint32_t page = order[other];
        order[other] = order[i];
        order[i] = page;
    }
    return order;
}

static void guest(struct floor_world *world)
{
    struct floor_memory memory;
    struct floor_report *report = world->report;
    uint32_t *order = shuffled_pages(world);
    uint64_t stall_ns = under_stream(world) ? STALL_NS : 0, touch;
    char byte;
    floor_guest_create(world, &memory);
    floor_check(floor_receive(world->guest_end[0], &byte, 1) == 1, "the word to start");
    for (touch = 0; touch < world->options.touches && !atomic_load_explicit(&report->stop, memory_order_relaxed); touch++) {
        const volatile uint64_t *word = (const volatile uint64_t *)(memory.mapping + (uint64_t)order[touch] * PAGE_BYTES);
        uint64_t began_ns = clock_monotonic_ns();
        uint64_t value = *word;
        uint64_t took_ns = clock_monotonic_ns() - began_ns;
        if (took_ns >= stall_ns)
            report->latency_ns[report->count++] = took_ns;
        floor_check(value == floor_page_word(world, order[touch]), "the content of a touched page");
    }
    report->touched = touch;
    if (under_stream(world))
        floor_check(floor_receive(world->guest_end[0], &byte, 1) == 1, "the end of the stream");
    (void)*(const volatile char *)(memory.mapping + memory.pages * PAGE_BYTES);
}

static void *stream_thread(void *argument)
{
    struct source *self = argument;
    char byte;
    floor_check(floor_receive(self->bulk, &byte, 1) == 1, "the start of the stream");
    floor_stream_send(self->world, self->bulk, self->memory, FAULT_RUN_BYTES / PAGE_BYTES);
    return NULL;
}

static void source(struct floor_world *world)
{
    struct source self = {.world = world, .memory = world->source_memory};
    pthread_t thread = 0;
    char byte;
    if (self.memory == NULL)
        self.memory = floor_source_memory(world);
    else
        floor_check(floor_receive(world->daemon_end[1], &byte, 1) == 1, "the guest's pause");
    self.urgent = floor_accept(world->listener);
    if (under_stream(world)) {
        self.bulk = floor_accept(world->listener);
        thread = start_thread(stream_thread, &self);
    }
    floor_send(self.urgent, "r", 1, 0);
    for (uint64_t page; floor_receive(self.urgent, &page, sizeof page) != 0;) {
        floor_check(page < world->pages, "the page asked for");
        floor_send(self.urgent, self.memory + page * PAGE_BYTES, PAGE_BYTES, 0);
    }
    if (under_stream(world))
        pthread_join(thread, NULL);
}

static int claim(struct destination *self, uint64_t page)
{
    unsigned char absent = ABSENT;
    return atomic_compare_exchange_strong(&self->state[page], &absent, CLAIMED);
}

static void place_claimed(struct destination *self, uint64_t page, uint64_t count, const unsigned char *bytes)
{
    floor_place(&self->memory, page, bytes, count * PAGE_BYTES);
    for (uint64_t i = 0; i < count; i++)
        atomic_store_explicit(&self->state[page + i], PRESENT, memory_order_release);
    floor_continue(&self->memory, page, count);
}

static void *bulk_thread(void *argument)
{
    struct destination *self = argument;
    unsigned char *hot = floor_allocate(FAULT_RUN_BYTES);
    struct floor_run run;
    uint64_t began_ns = clock_monotonic_ns();
    floor_send(self->bulk, "s", 1, 0);
    while (floor_check(floor_receive(self->bulk, &run, sizeof run) != 0, "the stream"), run.kind != RUN_END) {
        floor_check(floor_receive(self->bulk, hot, (size_t)run.page_count * PAGE_BYTES) != 0, "a run");
        for (uint32_t first = 0, end; first < run.page_count; first = end + 1) { /* end: somebody else's, or past the run */
            for (end = first; end < run.page_count && claim(self, run.page_index + end); end++)
                ;
            if (end > first)
                place_claimed(self, run.page_index + first, end - first, hot + (size_t)first * PAGE_BYTES);
        }
    }
    self->world->report->stream_ns = clock_monotonic_ns() - began_ns;
    atomic_store(&self->world->report->stop, 1);
    floor_send(self->world->daemon_end[0], "e", 1, 0);
    return NULL;
}

static void answer_faults(struct destination *self)
{
    unsigned char *hot = floor_allocate(PAGE_BYTES);
    for (uint64_t page; (page = floor_read_fault(&self->memory)) != self->memory.pages;) {
        self->world->report->events++;
        if (atomic_load(&self->state[page]) == ABSENT) {
            floor_send(self->urgent, &page, sizeof page, 0);
            floor_check(floor_receive(self->urgent, hot, PAGE_BYTES) != 0, "the page asked for");
            if (claim(self, page)) {
                place_claimed(self, page, 1, hot);
                continue;
            }
        }
        /* The bulk thread has it. CLAIMED: its CONTINUE comes and wakes the guest. PRESENT: it may have come before the fault. */
        if (atomic_load(&self->state[page]) == PRESENT)
            floor_continue(&self->memory, page, 1);
    }
    floor_release_end_page(&self->memory);
}

static void destination(struct floor_world *world)
{
    struct destination self = {.world = world, .state = floor_allocate(world->pages)};
    pthread_t thread = 0;
    char byte;
    for (uint64_t page = 0; page < world->pages; page++)
        atomic_init(&self.state[page], ABSENT);
    floor_guest_adopt(world, &self.memory);
    self.urgent = floor_connect(world);
    if (under_stream(world))
        self.bulk = floor_connect(world);
    floor_check(floor_receive(self.urgent, &byte, 1) == 1, "a source that is ready");
    floor_let_warm_memory_go(world);
    if (under_stream(world))
        thread = start_thread(bulk_thread, &self);
    floor_send(world->daemon_end[0], "g", 1, 0);
    answer_faults(&self);
    if (under_stream(world))
        pthread_join(thread, NULL);
}

void floor_fault(struct floor_world *world)
{
    floor_start("source", source, world);
    floor_start("destination", destination, world);
#ifdef FLOOR_KVM
    floor_start("guest", world->source_memory != NULL ? floor_kvm_guest : guest, world);
#else
    floor_start("guest", guest, world);
#endif
}
