/* postcopy-floor: what the product's work costs in bare C with nothing but the necessary system calls. The benchmark divides
 * by it, so it is as fast as this can honestly be made; what was tried for that stands at the head of each scenario's file.
 *
 *   postcopy-floor fault-idle          first touches, nothing else going on     [--memory-bytes N --touches N --seed N]
 *   postcopy-floor fault-under-stream  first touches beside a full-rate stream  [the same]
 *   postcopy-floor fault-kvm           first touches by a KVM guest (x86-64)     [the same; all of its pages]
 *   postcopy-floor stream              the whole memory, and its cost in CPU    [--memory-bytes N --zero-per-mille N --seed N]
 *   postcopy-floor huge-urgent         first touches of pages of 2 MiB          [--memory-bytes N --seed N]
 *   postcopy-floor huge-stream         a whole memory of such pages             [the same]
 *   postcopy-floor hops                a switchover's messages, without memory  [--moves N]
 *   postcopy-floor warm                see below                                [--memory-bytes N]
 *   all: [--deadline-seconds N] [--congestion-control NAME|system]
 *
 * One JSON object on stdout, in seconds, bytes, bytes/second; a histogram is pairs of a bucket's lower bound in ns (histogram.h)
 * and its count. Exit status: 0; 1 with a message on stderr if anything failed or the deadline passed; 2 for wrong usage. Three
 * processes (four for hops) are forked, bound to this one, and reaped by id. One sleeping thread per job, no pinning, no polling.
 * Contents are checked, outside the clock.
 *
 * Congestion control is reno unless told otherwise: always permitted, and nothing on loopback is in its way (floor_stream.c).
 *
 * Warm memory: in a virtual machine, a free page that the host has taken back costs microseconds at its next allocation, and the
 * stream falls to half or a quarter at random. So the parent holds memory_bytes of touched memory, let go just before the clock
 * starts. A product run wants the same: `warm` touches that much, prints {"name": "warm", ...}, waits until stdin ends, and
 * lets go by exiting. */
#include "floor.h"
#include "histogram.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

static int by_value(const void *left, const void *right)
{
    uint64_t a = *(const uint64_t *)left, b = *(const uint64_t *)right;
    return (a > b) - (a < b);
}

/* Nearest rank of sorted values, in seconds: the least one that is not below per_cent of them. */
static double quantile_seconds(const uint64_t *sorted_ns, uint64_t count, uint64_t per_cent)
{
    uint64_t rank = (count * per_cent + 99) / 100;
    return (double)sorted_ns[rank > 0 ? rank - 1 : 0] / 1e9;
}

static void print_latencies(struct floor_report *report)
{
    uint64_t *value_ns = report->latency_ns, count = report->count;
    floor_check(count > 0, "the number of values");
    qsort(value_ns, count, sizeof *value_ns, by_value);
    printf(", \"unit\": \"seconds\", \"p50\": %.9f, \"p99\": %.9f, \"max\": %.9f, \"n\": %" PRIu64 ", \"histogram\": [",
           quantile_seconds(value_ns, count, 50), quantile_seconds(value_ns, count, 99), quantile_seconds(value_ns, count, 100),
           count);
    for (uint64_t i = 0, first; i < count;) {
        uint32_t bucket = histogram_bucket_of(value_ns[i]);
        for (first = i; i < count && histogram_bucket_of(value_ns[i]) == bucket; i++)
            ;
        printf("%s[%" PRIu64 ", %" PRIu64 "]", first == 0 ? "" : ", ", histogram_bucket_low_ns(bucket), i - first);
    }
    printf("]");
}

static void print_fault_idle(const struct floor_world *world)
{
    print_latencies(world->report);
    printf(", \"touched\": %" PRIu64 ", \"faults\": %" PRIu64, world->report->touched, world->report->events);
}

static double stream_bytes_per_second(const struct floor_world *world)
{
    return (double)world->options.memory_bytes / ((double)world->report->stream_ns / 1e9);
}

static void print_fault_under_stream(const struct floor_world *world)
{
    print_fault_idle(world);
    printf(", \"stalled_at_least_seconds\": 0.000002, \"stream_bytes_per_second\": %.0f", stream_bytes_per_second(world));
}

static void print_stream(const struct floor_world *world)
{
    const struct floor_report *report = world->report;
    double cpu_seconds = report->source_cpu_seconds + report->destination_cpu_seconds;
    printf(", \"unit\": \"bytes/second\", \"value\": %.0f, \"duration_seconds\": %.9f, \"memory_bytes\": %" PRIu64
           ", \"zero_pages\": %" PRIu64 ", \"source_cpu_seconds\": %.6f, \"destination_cpu_seconds\": %.6f"
           ", \"cpu_seconds_per_gib\": %.6f",
           stream_bytes_per_second(world), (double)report->stream_ns / 1e9, world->options.memory_bytes, report->zero_pages,
           report->source_cpu_seconds, report->destination_cpu_seconds,
           cpu_seconds * (double)(1u << 30) / (double)world->options.memory_bytes);
}

static void print_huge_stream(const struct floor_world *world)
{
    printf(", \"unit\": \"bytes/second\", \"value\": %.0f", stream_bytes_per_second(world));
}

static void print_hops(const struct floor_world *world)
{
    print_latencies(world->report);
}

#ifdef FLOOR_KVM
static void *map_shared(size_t size_bytes);

static void start_fault_kvm(struct floor_world *world)
{
    world->source_memory = map_shared(world->options.memory_bytes);
    floor_fault(world);
}
#endif

static const struct scenario {
    const char *name;
    void (*start)(struct floor_world *world);
    void (*print)(const struct floor_world *world);
} scenarios[] = {
    {"fault-idle", floor_fault, print_fault_idle}, {"fault-under-stream", floor_fault, print_fault_under_stream},
#ifdef FLOOR_KVM
    {"fault-kvm", start_fault_kvm, print_fault_idle},
#endif
    {"stream", floor_stream, print_stream},        {"hops", floor_hops, print_hops},
    {"huge-urgent", floor_huge, print_fault_idle}, {"huge-stream", floor_huge, print_huge_stream},
    {"warm", NULL, NULL},
};

static _Noreturn void refuse(const char *why)
{
    fprintf(stderr,
            "postcopy-floor: %s\nusage: postcopy-floor fault-idle|fault-under-stream|fault-kvm|stream|huge-urgent|huge-stream|hops|warm [--memory-bytes N]"
            " [--touches N | --moves N]\n       [--seed N] [--zero-per-mille N] [--deadline-seconds N]"
            " [--congestion-control NAME|system]\n", why);
    exit(2);
}

static uint64_t number(const char *text, uint64_t least, uint64_t most)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != 0 || *text == '-' || value < least || value > most)
        refuse("an option's number is out of range");
    return value;
}

static const struct scenario *read_options(int argc, char **argv, struct floor_options *options)
{
    static const struct option names[] = {
        {"memory-bytes", required_argument, NULL, 'm'}, {"touches", required_argument, NULL, 't'},
        {"moves", required_argument, NULL, 't'}, {"seed", required_argument, NULL, 's'},
        {"zero-per-mille", required_argument, NULL, 'z'}, {"deadline-seconds", required_argument, NULL, 'd'},
        {"congestion-control", required_argument, NULL, 'c'}, {NULL, 0, NULL, 0}};
    for (int letter; (letter = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (letter) {
        case 'm': options->memory_bytes = number(optarg, PAGE_BYTES, UINT64_C(1) << 40); break;
        case 't': options->touches = number(optarg, 1, UINT64_C(1) << 28); break;
        case 's': options->seed = number(optarg, 0, UINT64_MAX); break;
        case 'z': options->zero_per_mille = number(optarg, 0, 1000); break;
        case 'd': options->deadline_seconds = number(optarg, 1, 86400); break;
        case 'c': options->congestion_control = optarg; break;
        default: refuse("unknown option");
        }
    }
    if (optind + 1 != argc)
        refuse("one scenario, please");
    options->scenario = argv[optind];
    for (size_t i = 0; i < sizeof scenarios / sizeof *scenarios; i++) {
        if (strcmp(options->scenario, scenarios[i].name) != 0)
            continue;
        if (options->memory_bytes % PAGE_BYTES != 0)
            refuse("--memory-bytes must be a whole number of 4096-byte pages");
        if (scenarios[i].start == floor_huge && options->memory_bytes % HUGE_PAGE_BYTES != 0)
            refuse("--memory-bytes must be a whole number of 2 MiB pages");
        if (scenarios[i].start == floor_fault && options->touches > options->memory_bytes / PAGE_BYTES)
            refuse("--touches must not exceed the number of pages: they are first touches");
        if (scenarios[i].start != floor_stream && options->zero_per_mille != 0)
            refuse("--zero-per-mille is for stream");
        return &scenarios[i];
    }
    refuse("no such scenario");
}

static void *map_shared(size_t size_bytes)
{
    void *mapping = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    floor_expect(mapping != MAP_FAILED && madvise(mapping, size_bytes, MADV_POPULATE_WRITE) == 0, "shared memory");
    return mapping;
}

int main(int argc, char **argv)
{
    struct floor_world world = {.options = {.congestion_control = "reno", .memory_bytes = 256u << 20, .touches = 2000, .seed = 1,
                                            .deadline_seconds = 60}};
    const struct scenario *scenario = read_options(argc, argv, &world.options);
    floor_deadline((unsigned)world.options.deadline_seconds);
    uint64_t began_ns = clock_monotonic_ns();
    world.page_bytes = scenario->start == floor_huge ? HUGE_PAGE_BYTES : PAGE_BYTES;
    if (scenario->start != floor_hops && scenario->start != floor_huge)
        world.pool = map_shared(world.options.memory_bytes);
    if (scenario->start == NULL) {
        char byte;
        printf("{\"name\": \"warm\", \"duration_seconds\": %.9f}\n", (double)(clock_monotonic_ns() - began_ns) / 1e9);
        fflush(stdout);
        while (read(STDIN_FILENO, &byte, 1) > 0)
            ;
        return 0;
    }
    world.pages = world.options.memory_bytes / world.page_bytes;
    if (scenario->start == floor_huge)
        world.options.touches = world.pages;
    world.report = map_shared(sizeof *world.report + world.options.touches * sizeof(uint64_t));
    world.listener = floor_listen(world.options.congestion_control);
    for (int side = 0; side < 2; side++) {
        int ends[2];
        floor_expect(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
        world.guest_end[side] = ends[0];
        world.daemon_end[side] = ends[1];
    }
    scenario->start(&world);
    floor_reap();
    printf("{\"name\": \"%s\"", scenario->name);
    scenario->print(&world);
    printf("}\n");
    return fflush(stdout) == 0 ? 0 : 1;
}
