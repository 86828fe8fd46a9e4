/* See resolve.h. Facts of the kernel that decide this file (tests/kernel/test_resolving.py shows each):
 *   CONTINUE on a page that is mapped is EEXIST and wakes nobody: UFFDIO_WAKE by hand.
 *   A range that ends early is EAGAIN with mapped > 0, which is progress; the real errno comes with the next call.
 *   A range over several mappings is ENOENT as a whole, and one mapping is several as soon as the guest gives a part of it another
 *   property (mprotect, mlock, madvise): it is taken in halves, so that only a page that is not mapped is ENOENT
 *   (tests/failure/test_split_mappings.py).
 *   The result field is signed. EAGAIN with nothing mapped: an event is unread or the address space is changing: retry, but not for
 *   long, since the thread that reads events is one of those that come here.
 *   UNREGISTER wakes who waits, but a fault that is just entering, under the lock of its VMA alone (6.4), can queue behind that wake and
 *   would sleep for ever: UFFDIO_WAKE after it, which finds it (tests/kernel/test_forking.py hung on it three times in a hundred).
 *   hugetlbfs has no ZEROPAGE: fallocate gives a cleared page, CONTINUE maps it. */
#include "resolve.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <sys/ioctl.h>

#include "../uffd/kernel.h"

#define RETRIES_MAX 100 /* of an EAGAIN without progress: tens of microseconds */

static void wake(int userfaultfd, uint64_t address, uint64_t size_bytes)
{
    struct uffdio_range range = {.start = address, .len = size_bytes};
    ioctl(userfaultfd, UFFDIO_WAKE, &range);
}

static enum resolve_outcome outcome_of(int error_number)
{
    switch (error_number) {
    case EEXIST:
        return RESOLVE_ALREADY;
    case EFAULT:
        return RESOLVE_HOLE;
    case EAGAIN:
        return RESOLVE_CHANGING;
    case ESRCH:
    case ENOENT:
        return RESOLVE_GONE;
    default:
        return RESOLVE_FAILED;
    }
}

struct resolution resolve_continue(int userfaultfd, const struct region *region, uint64_t page_index, uint64_t page_count)
{
    struct resolution resolution = {.outcome = RESOLVE_MAPPED};
    uint64_t page_bytes = region->memory.page_bytes;
    uint64_t address = region->memory.guest_address + page_index * page_bytes;
    uint64_t end = address + page_count * page_bytes, part_end = end;
    uint32_t retries = 0;
    while (address < end) {
        if (part_end <= address)
            part_end = end;
        struct uffdio_continue request = {.range = {.start = address, .len = part_end - address}};
        if (ioctl(userfaultfd, UFFDIO_CONTINUE, &request) == 0) {
            resolution.pages_done += (part_end - address) / page_bytes;
            address = part_end;
            continue;
        }
        int error_number = errno;
        if (request.mapped > 0) {
            resolution.pages_done += (uint64_t)request.mapped / page_bytes;
            address += (uint64_t)request.mapped;
            continue;
        }
        if (error_number == EAGAIN && retries++ < RETRIES_MAX) {
            sched_yield();
            continue;
        }
        uint64_t part_pages = (part_end - address) / page_bytes;
        if (error_number == ENOENT && part_pages > 1) {
            part_end = address + part_pages / 2 * page_bytes;
            continue;
        }
        resolution.outcome = outcome_of(error_number);
        if (resolution.outcome != RESOLVE_ALREADY) {
            resolution.error_number = error_number;
            return resolution;
        }
        wake(userfaultfd, address, page_bytes);
        resolution.wakes++;
        resolution.pages_done++;
        address += page_bytes;
    }
    resolution.outcome = resolution.wakes == page_count ? RESOLVE_ALREADY : RESOLVE_MAPPED;
    return resolution;
}

static struct resolution resolve_zeropage(int userfaultfd, const struct region *region, uint64_t page_index)
{
    struct uffdio_zeropage request = {
        .range = {.start = region->memory.guest_address + page_index * region->memory.page_bytes, .len = region->memory.page_bytes}};
    for (uint32_t retries = 0; ioctl(userfaultfd, UFFDIO_ZEROPAGE, &request) < 0; retries++) {
        if (errno == EAGAIN && retries < RETRIES_MAX) {
            sched_yield();
            continue;
        }
        struct resolution failed = {.outcome = outcome_of(errno), .error_number = errno};
        if (failed.outcome == RESOLVE_ALREADY) {
            wake(userfaultfd, request.range.start, request.range.len);
            failed.wakes = failed.pages_done = 1;
        }
        return failed;
    }
    return (struct resolution){.outcome = RESOLVE_MAPPED, .pages_done = 1};
}

struct resolution resolve_zero(int userfaultfd, const struct region *region, uint64_t page_index)
{
    if (!region->is_hugetlb)
        return resolve_zeropage(userfaultfd, region, page_index);
    while (fallocate(region->memory.memory_fd, 0, (off_t)region_file_offset(region, page_index), region->memory.page_bytes) < 0)
        if (errno != EINTR)
            return (struct resolution){.outcome = RESOLVE_FAILED, .error_number = errno};
    return resolve_continue(userfaultfd, region, page_index, 1);
}

bool resolve_can_poison(int userfaultfd)
{
    /* One that is not known is EINVAL; one that is looks at its argument, unless the address space is changing. */
    return ioctl(userfaultfd, UFFDIO_POISON, NULL) < 0 && errno != EINVAL;
}

struct resolution resolve_poison(int userfaultfd, const struct region *region, uint64_t page_index, uint64_t page_count)
{
    struct resolution resolution = {.outcome = RESOLVE_MAPPED};
    uint64_t page_bytes = region->memory.page_bytes;
    uint64_t address = region->memory.guest_address + page_index * page_bytes;
    uint64_t end = address + page_count * page_bytes;
    uint32_t retries = 0;
    while (address < end) {
        struct uffdio_poison request = {.range = {.start = address, .len = end - address}};
        uint64_t done_bytes = ioctl(userfaultfd, UFFDIO_POISON, &request) == 0 ? end - address : 0;
        int error_number = errno;
        if (done_bytes == 0 && request.updated > 0)
            done_bytes = (uint64_t)request.updated;
        if (done_bytes == 0 && error_number == EAGAIN && retries++ < RETRIES_MAX) {
            sched_yield();
            continue;
        }
        if (done_bytes == 0) {
            enum resolve_outcome outcome = outcome_of(error_number);
            if (outcome != RESOLVE_ALREADY && outcome != RESOLVE_HOLE) {
                resolution.outcome = outcome;
                resolution.error_number = error_number;
                return resolution;
            }
            wake(userfaultfd, address, page_bytes);
            resolution.wakes++;
            done_bytes = page_bytes;
        }
        resolution.pages_done += done_bytes / page_bytes;
        address += done_bytes;
    }
    return resolution;
}

void resolve_wake(int userfaultfd, const struct region *region, uint64_t page_index, uint64_t page_count)
{
    uint64_t page_bytes = region->memory.page_bytes;
    wake(userfaultfd, region->memory.guest_address + page_index * page_bytes, page_count * page_bytes);
}

int resolve_unregister(int userfaultfd, const struct region *region)
{
    struct uffdio_range range = {.start = region->memory.guest_address, .len = region->memory.size_bytes};
    if (ioctl(userfaultfd, UFFDIO_UNREGISTER, &range) < 0)
        return errno;
    wake(userfaultfd, range.start, range.len);
    return 0;
}
