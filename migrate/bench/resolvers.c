/* postcopy-resolvers: one way to resolve page faults, measured alone, in bare C without a network.
 *
 *   postcopy-resolvers WAY [--pages N --passes N --bulk-pages N --seed N --deadline-seconds N]
 *
 * The job is the same for every way (resolvers_ways.c): an area of absent pages, and content that each page must have.
 *   bulk     nobody touches: --bulk-pages pages in ranges of 1, 4, 16, 64, 256, 512 pages a call, fresh memory for each size.
 *   touches  --passes times over, each with fresh memory: one thread reads the first word of each of --pages pages, in random
 *            order, and times it. Another thread sleeps in poll(), reads the fault, resolves one page. For the ways called
 *            sigbus-* there is no other thread: the toucher's own signal handler resolves. Where the threads run:
 *            resolvers_touch.c.
 *   fill     where content lies in place before the fault (CONTINUE, MOVE), what bringing it there has cost.
 * Content comes from a hot buffer, as if received there a moment ago. Every byte is checked, outside the clock; pages are 4 KiB
 * or hugetlb's 2 MiB, never transparent huge ones.
 *
 * One JSON object on stdout, in seconds; a histogram is pairs of a bucket's lower bound in ns (histogram.h) and its count. Where
 * the machine lacks what the way needs, the object holds the name and "lacks". Exit status: 0; 1 with a message on stderr if
 * anything failed, a wrong byte included, or the deadline passed; 2 for wrong usage. */
#include "floor.h"
#include "resolvers.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>

static const uint64_t range_pages[] = {1, 4, 16, 64, 256, 512};
#define RANGES (sizeof range_pages / sizeof *range_pages)

struct options {
    uint64_t pages, passes, bulk_pages, seed, deadline_seconds;
};

struct figures {
    struct touches touches[PLACEMENTS];
    double bulk_seconds[RANGES]; /* a page; 0: not measured */
    uint64_t fill_ns, filled_pages;
};

static _Noreturn void refuse(const char *why)
{
    fprintf(stderr, "postcopy-resolvers: %s\nusage: postcopy-resolvers WAY [--pages N] [--passes N] [--bulk-pages N] [--seed N]"
                    " [--deadline-seconds N]\nways:", why);
    for (uint32_t i = 0; way_name(i) != NULL; i++)
        fprintf(stderr, " %s", way_name(i));
    fprintf(stderr, "\n");
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

static const struct way *read_options(int argc, char **argv, struct options *options)
{
    static const struct option names[] = {
        {"pages", required_argument, NULL, 'p'}, {"passes", required_argument, NULL, 'n'},
        {"bulk-pages", required_argument, NULL, 'b'}, {"seed", required_argument, NULL, 's'},
        {"deadline-seconds", required_argument, NULL, 'd'}, {NULL, 0, NULL, 0}};
    for (int letter; (letter = getopt_long(argc, argv, "", names, NULL)) != -1;) {
        switch (letter) {
        case 'p': options->pages = number(optarg, 1, UINT64_C(1) << 28); break;
        case 'n': options->passes = number(optarg, 1, UINT64_C(1) << 20); break;
        case 'b': options->bulk_pages = number(optarg, 1, UINT64_C(1) << 28); break;
        case 's': options->seed = number(optarg, 0, UINT64_MAX); break;
        case 'd': options->deadline_seconds = number(optarg, 1, 86400); break;
        default: refuse("unknown option");
        }
    }
    if (optind + 1 != argc)
        refuse("one way, please");
    const struct way *way = way_named(argv[optind]);
    if (way == NULL)
        refuse("no such way");
    return way;
}

static void create_filled(struct area *area, const struct way *way, uint64_t pages, uint64_t seed, struct figures *figures)
{
    area_create(area, way, pages, seed);
    if (way->fill == NULL)
        return;
    uint64_t began_ns = clock_monotonic_ns();
    way->fill(area);
    figures->fill_ns += clock_monotonic_ns() - began_ns;
    figures->filled_pages += pages;
}

static void measure_touches(const struct way *way, const struct options *options, struct figures *figures)
{
    for (uint64_t pass = 0; pass < options->passes * PLACEMENTS; pass++) {
        enum placement placement = (enum placement)(pass % PLACEMENTS);
        struct area area;
        if (!placement_is_there(way, placement))
            continue;
        create_filled(&area, way, options->pages, options->seed + pass, figures);
        touch_all(&area, placement, &figures->touches[placement]);
        area_check(&area);
        area_destroy(&area);
    }
}

/* Seconds a page. */
static double measure_range(const struct way *way, const struct options *options, uint64_t range, struct figures *figures)
{
    struct area area;
    create_filled(&area, way, options->bulk_pages, options->seed, figures);
    uint64_t began_ns = clock_monotonic_ns();
    for (uint64_t page = 0; page < area.pages; page += range)
        way->resolve(&area, page, range < area.pages - page ? range : area.pages - page);
    uint64_t took_ns = clock_monotonic_ns() - began_ns;
    area_check(&area);
    area_destroy(&area);
    return (double)took_ns / 1e9 / (double)options->bulk_pages;
}

static void print_touches(const char *separator, const char *placement, const struct touches *touches)
{
    struct histogram_copy copy;
    histogram_read(&touches->latency, &copy);
    printf("%s\"%s\": {\"n\": %" PRIu64 ", \"cpu_seconds_per_page\": %.9f, \"histogram\": [", separator, placement, copy.count,
           touches->cpu_seconds / (double)copy.count);
    separator = "";
    for (uint32_t bucket = 0; bucket < HISTOGRAM_BUCKETS; bucket++) {
        if (copy.bucket[bucket] == 0)
            continue;
        printf("%s[%" PRIu64 ", %" PRIu64 "]", separator, histogram_bucket_low_ns(bucket), copy.bucket[bucket]);
        separator = ", ";
    }
    printf("]}");
}

static void print_figures(const struct way *way, const struct figures *figures)
{
    static const char *const placement_name[PLACEMENTS] = {"unpinned", "one-cpu", "two-cpus"};
    printf("{\"name\": \"%s\", \"unit\": \"seconds\", \"page_bytes\": %u, \"touches\": {", way->name,
           way->kind == HUGETLB ? HUGE_PAGE_BYTES : SMALL_PAGE_BYTES);
    for (enum placement placement = UNPINNED; placement < PLACEMENTS; placement++)
        if (placement_is_there(way, placement))
            print_touches(placement == UNPINNED ? "" : ", ", placement_name[placement], &figures->touches[placement]);
    printf("}, \"bulk_seconds_per_page\": {");
    for (size_t i = 0; i < RANGES; i++)
        if (figures->bulk_seconds[i] > 0)
            printf("%s\"%" PRIu64 "\": %.12f", i == 0 ? "" : ", ", range_pages[i], figures->bulk_seconds[i]);
    printf("}");
    if (figures->filled_pages > 0)
        printf(", \"fill_seconds_per_page\": %.12f", (double)figures->fill_ns / 1e9 / (double)figures->filled_pages);
    printf("}\n");
}

int main(int argc, char **argv)
{
    static struct figures figures;
    struct options options = {.pages = 4096, .passes = 1, .bulk_pages = 8192, .seed = 1, .deadline_seconds = 30};
    const struct way *way = read_options(argc, argv, &options);
    floor_name(way->name);
    floor_deadline((unsigned)options.deadline_seconds);
    floor_expect(prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0, "PR_SET_THP_DISABLE");
    if (way->kind != HUGETLB) /* twice: MOVE has its pages' content elsewhere before */
        area_warm(2 * SMALL_PAGE_BYTES * (options.pages > options.bulk_pages ? options.pages : options.bulk_pages));
    /* Bulk comes first: once threads have touched from two CPUs, MOVE has both CPUs' address translations to flush. */
    for (size_t i = 0; i < RANGES && !way->in_place; i++) /* in place or not, the calls are the same */
        if (range_pages[i] <= options.bulk_pages)
            figures.bulk_seconds[i] = measure_range(way, &options, range_pages[i], &figures);
    measure_touches(way, &options, &figures);
    print_figures(way, &figures);
    return fflush(stdout) == 0 ? 0 : 1;
}
