/* The ways to resolve a fault. What each stands for:
 *   copy-*       content lies in a buffer, UFFDIO_COPY allocates a page and copies it there
 *   zeropage-*   content is known to be zero
 *   move-anon    content was received into other anonymous memory, UFFDIO_MOVE takes its pages along (Linux 6.8)
 *   continue-*   content is in the file already, written by whoever else maps it: UFFDIO_CONTINUE maps it and nothing more
 *   store-shmem  content lies in a buffer, is stored through a second mapping of the file, and mapped by CONTINUE: the product's
 *                urgent path (migrate/dataplane/place.c); pwrite-shmem is the same by pwrite(), its bulk path
 *   sigbus-*     UFFD_FEATURE_SIGBUS: the thread that touches gets a signal instead of waiting, and resolves the page itself
 * Ranges are all absent, nothing else works on this memory: a call that does less than it was asked to is a failure. MOVE alone
 * may say EAGAIN, when it finds a page busy in the kernel (mm/userfaultfd.c, move_pages): it is asked again. */
#include "floor.h"
#include "resolvers.h"

#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../uffd/kernel.h"

#define FILL_BYTES (1u << 20) /* at a time: the product's bulk runs */

static uint64_t address_of(const struct area *area, uint64_t page)
{
    return (uint64_t)(uintptr_t)area->mapping + page * area->page_bytes;
}

static void resolve_copy(const struct area *area, uint64_t page, uint64_t count)
{
    area_make_hot(area, page, count);
    struct uffdio_copy request = {
        .dst = address_of(area, page), .src = (uint64_t)(uintptr_t)area->hot, .len = count * area->page_bytes};
    floor_expect(ioctl(area->userfaultfd, UFFDIO_COPY, &request) == 0, "UFFDIO_COPY");
}

static void resolve_zeropage(const struct area *area, uint64_t page, uint64_t count)
{
    struct uffdio_zeropage request = {.range = {address_of(area, page), count * area->page_bytes}};
    floor_expect(ioctl(area->userfaultfd, UFFDIO_ZEROPAGE, &request) == 0, "UFFDIO_ZEROPAGE");
}

static void resolve_move(const struct area *area, uint64_t page, uint64_t count)
{
    uint64_t source = (uint64_t)(uintptr_t)area->received + page * area->page_bytes;
    for (uint64_t done = 0, size_bytes = count * area->page_bytes; done < size_bytes;) {
        struct uffdio_move request = {.dst = address_of(area, page) + done, .src = source + done, .len = size_bytes - done};
        if (ioctl(area->userfaultfd, UFFDIO_MOVE, &request) == 0)
            return;
        floor_expect(errno == EAGAIN, "UFFDIO_MOVE");
        done += request.move > 0 ? (uint64_t)request.move : 0;
    }
}

static void resolve_continue(const struct area *area, uint64_t page, uint64_t count)
{
    struct uffdio_continue request = {.range = {address_of(area, page), count * area->page_bytes}};
    floor_expect(ioctl(area->userfaultfd, UFFDIO_CONTINUE, &request) == 0, "UFFDIO_CONTINUE");
}

static void store_from_hot(const struct area *area, uint64_t page, uint64_t count)
{
    area_make_hot(area, page, count);
    memcpy(area->alias + page * area->page_bytes, area->hot, count * area->page_bytes);
}

static void pwrite_from_hot(const struct area *area, uint64_t page, uint64_t count)
{
    size_t size_bytes = count * area->page_bytes;
    area_make_hot(area, page, count);
    floor_expect(pwrite(area->memfd, area->hot, size_bytes, (off_t)(page * area->page_bytes)) == (ssize_t)size_bytes, "pwrite");
}

static void resolve_store(const struct area *area, uint64_t page, uint64_t count)
{
    store_from_hot(area, page, count);
    resolve_continue(area, page, count);
}

static void resolve_pwrite(const struct area *area, uint64_t page, uint64_t count)
{
    pwrite_from_hot(area, page, count);
    resolve_continue(area, page, count);
}

static void receive_from_hot(const struct area *area, uint64_t page, uint64_t count)
{
    area_make_hot(area, page, count);
    memcpy(area->received + page * area->page_bytes, area->hot, count * area->page_bytes);
}

static void fill_by(void (*bring)(const struct area *area, uint64_t page, uint64_t count), const struct area *area)
{
    uint64_t most = area->page_bytes < FILL_BYTES ? FILL_BYTES / area->page_bytes : 1;
    for (uint64_t page = 0, count; page < area->pages; page += count) {
        count = most < area->pages - page ? most : area->pages - page;
        bring(area, page, count);
    }
}

static void fill_received(const struct area *area)
{
    fill_by(receive_from_hot, area);
}

static void fill_file(const struct area *area)
{
    fill_by(pwrite_from_hot, area);
}

static void fill_huge_file(const struct area *area) /* pwrite() on hugetlbfs is EINVAL */
{
    fill_by(store_from_hot, area);
}

#define MISSING UFFDIO_REGISTER_MODE_MISSING
#define MINOR UFFDIO_REGISTER_MODE_MINOR
#define SMALL_MINOR UFFD_FEATURE_MINOR_SHMEM
#define HUGE_MINOR UFFD_FEATURE_MINOR_HUGETLBFS

static const struct way ways[] = {
    {.name = "copy-anon", .kind = ANONYMOUS, .modes = MISSING, .resolve = resolve_copy},
    {.name = "copy-shmem", .kind = SHMEM, .modes = MISSING, .resolve = resolve_copy},
    {.name = "zeropage-anon", .kind = ANONYMOUS, .modes = MISSING, .resolve = resolve_zeropage, .zero = true},
    {.name = "zeropage-shmem", .kind = SHMEM, .modes = MISSING, .resolve = resolve_zeropage, .zero = true},
    {.name = "move-anon", .kind = ANONYMOUS, .modes = MISSING, .resolve = resolve_move, .fill = fill_received,
     .features = UFFD_FEATURE_MOVE, .needs = "UFFDIO_MOVE, Linux 6.8 or later"},
    {.name = "continue-shmem", .kind = SHMEM, .modes = MINOR, .resolve = resolve_continue, .fill = fill_file,
     .fault_flags = UFFD_PAGEFAULT_FLAG_MINOR, .features = SMALL_MINOR, .needs = "minor faults on shmem, Linux 5.14 or later"},
    {.name = "continue-hugetlb", .kind = HUGETLB, .modes = MINOR, .resolve = resolve_continue, .fill = fill_huge_file,
     .fault_flags = UFFD_PAGEFAULT_FLAG_MINOR, .features = HUGE_MINOR, .needs = "minor faults on hugetlbfs, Linux 5.13 or later"},
    {.name = "store-shmem", .kind = SHMEM, .modes = MISSING | MINOR, .resolve = resolve_store,
     .features = SMALL_MINOR, .needs = "minor faults on shmem, Linux 5.14 or later"},
    {.name = "pwrite-shmem", .kind = SHMEM, .modes = MISSING | MINOR, .resolve = resolve_pwrite,
     .features = SMALL_MINOR, .needs = "minor faults on shmem, Linux 5.14 or later"},
    {.name = "sigbus-copy-anon", .kind = ANONYMOUS, .modes = MISSING, .resolve = resolve_copy, .in_place = true,
     .features = UFFD_FEATURE_SIGBUS, .needs = "UFFD_FEATURE_SIGBUS, Linux 4.14 or later"},
    {.name = "sigbus-store-shmem", .kind = SHMEM, .modes = MISSING | MINOR, .resolve = resolve_store, .in_place = true,
     .features = UFFD_FEATURE_SIGBUS | SMALL_MINOR, .needs = "UFFD_FEATURE_SIGBUS with minor faults on shmem, Linux 5.14 or later"},
};
#define WAYS (sizeof ways / sizeof *ways)

const char *way_name(uint32_t index)
{
    return index < WAYS ? ways[index].name : NULL;
}

const struct way *way_named(const char *name)
{
    for (size_t i = 0; i < WAYS; i++)
        if (strcmp(ways[i].name, name) == 0)
            return &ways[i];
    return NULL;
}
