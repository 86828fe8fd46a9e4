/* Memory of the resolvers: an area behind a userfaultfd, the content that its pages must have, and the check of every byte. */
#include "floor.h"
#include "resolvers.h"

#include <errno.h>
#include <inttypes.h>
#include <linux/memfd.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../uffd/kernel.h"
#include "uffd.h"

/* Not a failure: the row says it. */
static _Noreturn __attribute__((format(printf, 2, 3))) void lack(const struct way *way, const char *format, ...)
{
    va_list arguments;
    printf("{\"name\": \"%s\", \"lacks\": \"", way->name);
    va_start(arguments, format);
    vprintf(format, arguments);
    va_end(arguments);
    printf("\"}\n");
    exit(fflush(stdout) == 0 ? 0 : 1);
}

static void *map_anonymous(uint64_t size_bytes)
{
    void *mapping = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    floor_expect(mapping != MAP_FAILED, "mmap");
    return mapping;
}

void area_warm(uint64_t size_bytes)
{
    void *mapping = map_anonymous(size_bytes);
    memset(mapping, 0x5a, size_bytes);
    floor_expect(munmap(mapping, size_bytes) == 0, "let warm memory go");
}

/* Both mappings of the file reserve its huge pages once; the second one succeeds if the first did. */
static unsigned char *map_file(const struct area *area)
{
    void *mapping = mmap(NULL, area->pages * area->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, area->memfd, 0);
    if (mapping == MAP_FAILED && errno == ENOMEM && area->way->kind == HUGETLB)
        lack(area->way, "needs %" PRIu64 " free pages of 2 MiB: set vm.nr_hugepages to %" PRIu64 " more than are in use",
             area->pages, area->pages);
    floor_expect(mapping != MAP_FAILED, "mmap of the file");
    return mapping;
}

static void open_file(struct area *area)
{
    bool huge = area->way->kind == HUGETLB;
    area->memfd = memfd_create("postcopy-resolvers", MFD_CLOEXEC | (huge ? MFD_HUGETLB | MFD_HUGE_2MB : 0));
    if (area->memfd < 0 && huge)
        lack(area->way, "needs pages of 2 MiB: %s", strerror(errno));
    floor_expect(area->memfd >= 0 && ftruncate(area->memfd, (off_t)(area->pages * area->page_bytes)) == 0, "memfd");
    area->mapping = map_file(area);
    area->alias = map_file(area);
}

static void register_area(struct area *area)
{
    struct uffd_opened opened;
    uint64_t features = area->way->features, ioctls;
    uffd_open(1, &opened); /* faults taken inside the kernel are none of ours */
    errno = opened.syscall_errno;
    floor_expect(opened.fd >= 0, "userfaultfd (neither /dev/userfaultfd nor the system call)");
    area->userfaultfd = opened.fd;
    errno = uffd_api(area->userfaultfd, &features);
    if (errno == EINVAL && area->way->needs != NULL)
        lack(area->way, "needs %s", area->way->needs);
    floor_expect(errno == 0, "UFFDIO_API");
    uint64_t address = (uint64_t)(uintptr_t)area->mapping, size_bytes = area->pages * area->page_bytes;
    errno = uffd_register(area->userfaultfd, address, size_bytes, area->way->modes, &ioctls);
    floor_expect(errno == 0, "UFFDIO_REGISTER");
}

/* Word i of a page. Only the first and the last word tell one page from another: two stores make the hot buffer any page, and
 * leave it as hot as if the page had been received into it. */
static uint64_t inner_word(const struct area *area, uint64_t i)
{
    return (area->seed + i) * UINT64_C(0x9e3779b97f4a7c15);
}

uint64_t area_first_word(const struct area *area, uint64_t page)
{
    uint64_t state = area->seed ^ page << 20;
    return area->way->zero ? 0 : floor_random(&state);
}

static uint64_t last_word(const struct area *area, uint64_t page)
{
    return area->way->zero ? 0 : ~area_first_word(area, page);
}

void area_make_hot(const struct area *area, uint64_t page, uint64_t count)
{
    uint64_t page_words = area->page_bytes / sizeof(uint64_t), *words = (uint64_t *)area->hot;
    for (uint64_t i = 0; i < count; i++, words += page_words) {
        words[0] = area_first_word(area, page + i);
        words[page_words - 1] = last_word(area, page + i);
    }
}

void area_create(struct area *area, const struct way *way, uint64_t pages, uint64_t seed)
{
    *area = (struct area){.way = way, .pages = pages, .seed = seed, .memfd = -1,
                          .page_bytes = way->kind == HUGETLB ? HUGE_PAGE_BYTES : SMALL_PAGE_BYTES};
    if (way->kind == ANONYMOUS)
        area->mapping = map_anonymous(pages * area->page_bytes);
    else
        open_file(area);
    register_area(area);
    if (way->features & UFFD_FEATURE_MOVE)
        area->received = map_anonymous(pages * area->page_bytes);
    area->hot = floor_allocate(HOT_BYTES);
    uint64_t page_words = area->page_bytes / sizeof(uint64_t), *words = (uint64_t *)area->hot;
    for (uint64_t i = 0; i < HOT_BYTES / sizeof *words; i++)
        words[i] = inner_word(area, i % page_words);
}

void area_destroy(struct area *area)
{
    uint64_t size_bytes = area->pages * area->page_bytes;
    floor_expect(munmap(area->mapping, size_bytes) == 0, "munmap");
    if (area->alias != NULL)
        floor_expect(munmap(area->alias, size_bytes) == 0, "munmap of the alias");
    if (area->received != NULL)
        floor_expect(munmap(area->received, size_bytes) == 0, "munmap of what was received");
    if (area->memfd >= 0)
        close(area->memfd);
    close(area->userfaultfd);
    free(area->hot);
}

void area_check(const struct area *area)
{
    uint64_t page_words = area->page_bytes / sizeof(uint64_t);
    for (uint64_t page = 0; page < area->pages; page++) {
        const uint64_t *words = (const uint64_t *)(area->mapping + page * area->page_bytes);
        uint64_t differing = words[0] ^ area_first_word(area, page);
        for (uint64_t i = 1; i < page_words - 1; i++)
            differing |= words[i] ^ (area->way->zero ? 0 : inner_word(area, i));
        floor_check((differing | (words[page_words - 1] ^ last_word(area, page))) == 0, "the content of a page");
    }
}
