/* See dirty.h. Source: Documentation/admin-guide/mm/pagemap.rst (PAGEMAP_SCAN, Linux 6.7).
 *
 * PM_SCAN_WP_MATCHING reads and re-arms in one step, so no write is lost between the two. It also calls the MMU notifiers
 * over all that it walks, which makes a KVM guest fault everything in again: so a read-only scan finds the runs first, and
 * only those are walked with it. What that second scan reports is what counts: a page written between the two is in it or
 * stays written for the next one.
 * A scan of a process that has ended finds nothing written, and says so without an error: only a read that succeeds after the
 * scan shows that there was something to find.
 * Nor is a range reported that is not mapped there: what had been written in it before it was unmapped is not seen. Whether
 * all is mapped and tracked is a walk of its own that costs five of the others, so it is made while the guest still runs.
 * Addresses are the guest's own: the descriptor is of its process, which opened it and passed it. */
#include "dirty.h"

#include <errno.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "../uffd/kernel.h"

#define RUNS_PER_SCAN 512
#define GAP_BYTES (128u << 10) /* runs closer than this are re-armed in one call */

struct scan {
    int pagemap_fd;
    uint64_t flags, category;
    uint64_t at, end; /* what is still to be walked */
    struct page_region run[RUNS_PER_SCAN];
};

/* The next runs of pages of the category: their number, 0 at the end, or -1 with errno. */
static long scan_next(struct scan *scan)
{
    while (scan->at < scan->end) {
        struct pm_scan_arg request = {
            .size = sizeof(request),
            .flags = scan->flags | PM_SCAN_CHECK_WPASYNC,
            .start = scan->at,
            .end = scan->end,
            .vec = (uint64_t)(uintptr_t)scan->run,
            .vec_len = RUNS_PER_SCAN,
            .category_mask = scan->category,
            .return_mask = scan->category,
        };
        int runs = ioctl(scan->pagemap_fd, PAGEMAP_SCAN, &request);
        if (runs < 0 && errno == EINTR)
            continue;
        if (runs < 0)
            return -1;
        if (request.walk_end <= scan->at) { /* not walked is not clean */
            errno = EIO;
            return -1;
        }
        scan->at = request.walk_end;
        if (runs > 0)
            return runs;
    }
    return 0;
}

static struct scan scan_of(const struct region *region, int pagemap_fd, uint64_t flags)
{
    uint64_t start = region->memory.guest_address;
    uint64_t end = start + region->memory.size_bytes;
    return (struct scan){.pagemap_fd = pagemap_fd, .flags = flags, .category = PAGE_IS_WRITTEN, .at = start, .end = end};
}

/* Pages of the region that the run touches. */
static void pages_of(const struct region *region, const struct page_region *run, uint64_t *first, uint64_t *end)
{
    uint64_t page_bytes = region->memory.page_bytes;
    *first = (run->start - region->memory.guest_address) / page_bytes;
    *end = (run->end - region->memory.guest_address + page_bytes - 1) / page_bytes;
}

static uint64_t mark(const struct region *region, const struct page_region *run, _Atomic uint8_t *pages)
{
    uint64_t first, end, newly = 0;
    pages_of(region, run, &first, &end);
    for (uint64_t page = region->first_page + first; page < region->first_page + end; page++)
        newly += !atomic_exchange_explicit(&pages[page], 1, memory_order_relaxed);
    return newly;
}

static int collect_armed(const struct region *region, int pagemap_fd, uint64_t start, uint64_t end, _Atomic uint8_t *pages, uint64_t *newly)
{
    struct scan arming = {.pagemap_fd = pagemap_fd, .flags = PM_SCAN_WP_MATCHING, .category = PAGE_IS_WRITTEN, .at = start, .end = end};
    long runs;
    while ((runs = scan_next(&arming)) > 0)
        for (long i = 0; i < runs; i++)
            *newly += mark(region, &arming.run[i], pages);
    return runs < 0 ? errno : 0;
}

static int collect_region(const struct region *region, int pagemap_fd, bool arm, _Atomic uint8_t *pages, uint64_t *newly)
{
    struct scan reading = scan_of(region, pagemap_fd, 0);
    long runs;
    while ((runs = scan_next(&reading)) > 0) {
        for (long i = 0; i < runs;) {
            long first = i;
            uint64_t end = reading.run[i++].end;
            while (i < runs && reading.run[i].start - end < GAP_BYTES)
                end = reading.run[i++].end;
            int error_number = arm ? collect_armed(region, pagemap_fd, reading.run[first].start, end, pages, newly) : 0;
            if (error_number != 0)
                return error_number;
            for (long run = first; !arm && run < i; run++)
                *newly += mark(region, &reading.run[run], pages);
        }
    }
    return runs < 0 ? errno : 0;
}

/* Is the guest process still there, and was it during the scan before? 0 or ESRCH. */
static int check_alive(const struct memory *memory, int pagemap_fd)
{
    uint64_t entry;
    off_t offset_bytes = (off_t)(memory->regions[0].memory.guest_address / 4096 * sizeof(entry));
    return pread(pagemap_fd, &entry, sizeof(entry), offset_bytes) == sizeof(entry) ? 0 : ESRCH;
}

int dirty_check(const struct memory *memory, int pagemap_fd)
{
    for (uint32_t r = 0; r < memory->region_count; r++) {
        struct scan tracked = scan_of(&memory->regions[r], pagemap_fd, 0);
        tracked.category = PAGE_IS_WPALLOWED;
        uint64_t tracked_bytes = 0;
        long runs;
        while ((runs = scan_next(&tracked)) > 0)
            for (long i = 0; i < runs; i++)
                tracked_bytes += tracked.run[i].end - tracked.run[i].start;
        if (runs < 0)
            return errno;
        int error_number = check_alive(memory, pagemap_fd);
        if (error_number != 0 || tracked_bytes != memory->regions[r].memory.size_bytes)
            return error_number != 0 ? error_number : EFAULT;
    }
    return 0;
}

int dirty_collect(const struct memory *memory, int pagemap_fd, bool arm, _Atomic uint8_t *pages, uint64_t *newly_marked)
{
    for (uint32_t r = 0; r < memory->region_count; r++) {
        int error_number = collect_region(&memory->regions[r], pagemap_fd, arm, pages, newly_marked);
        if (error_number != 0)
            return error_number;
    }
    return check_alive(memory, pagemap_fd);
}

int dirty_arm_all(const struct memory *memory, int pagemap_fd)
{
    for (uint32_t r = 0; r < memory->region_count; r++) {
        struct scan arming = scan_of(&memory->regions[r], pagemap_fd, PM_SCAN_WP_MATCHING);
        long runs;
        while ((runs = scan_next(&arming)) > 0)
            ;
        if (runs < 0)
            return errno;
    }
    return 0;
}

int dirty_count(const struct memory *memory, int pagemap_fd, uint64_t *pages, uint64_t *bytes)
{
    for (uint32_t r = 0; r < memory->region_count; r++) {
        const struct region *region = &memory->regions[r];
        struct scan reading = scan_of(region, pagemap_fd, 0);
        long runs;
        while ((runs = scan_next(&reading)) > 0)
            for (long i = 0; i < runs; i++) {
                uint64_t first, end;
                pages_of(region, &reading.run[i], &first, &end);
                *pages += end - first;
                *bytes += (end - first) * region->memory.page_bytes;
            }
        if (runs < 0)
            return errno;
    }
    return 0;
}
