/* Huge pages before a guest is accepted: all of them, so that none is lacking after the switchover (SIGBUS, EFAULT).
 *
 * Who has a descriptor cannot ask whether its file has a reservation: a mapping with MAP_NORESERVE has none, a punch gives it back.
 * But mapping the range shared reserves whatever it lacks, all or nothing, for the file and not for the mapping: it stays when that
 * goes. So nobody is asked, it is done; and refused before anything is taken from the pool.
 * A reservation is a number. Limits of the hugetlb cgroup, of cpusets and memory policies hold when a page is taken, by who takes it,
 * which is this daemon: so each page is taken now. What that costs, 0.24 ms a page of 2 MiB (5 ms for one that was never used since
 * boot), nearly all of it to clear it, its first write would cost later, in a fault that a guest waits for.
 * tests/kernel/test_memory_files.py shows each of these facts, tests/control/test_room.py what they are for. */
#include <poll.h>

#include "destination.h"
#include "result.h"

#define STEP_BYTES (32u << 20) /* 4 to 80 ms between looks at stop_fd; a page of 1 GiB is one step */

static bool allocate_all(const struct region *region, int stop_fd, struct loop_result *result)
{
    uint64_t step_pages = STEP_BYTES > region->memory.page_bytes ? STEP_BYTES / region->memory.page_bytes : 1;
    for (uint64_t first = 0; first < region->page_count; first += step_pages) {
        struct pollfd stop = {.fd = stop_fd, .events = POLLIN};
        if (poll(&stop, 1, 0) > 0)
            return result_fail(result, LOOP_STOPPED, 0, "poll");
        uint64_t left = region->page_count - first;
        int error_number = place_allocate(region, first, left < step_pages ? left : step_pages);
        if (error_number != 0)
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "allocate");
    }
    return true;
}

void destination_back(struct destination *destination, struct loop_result *result)
{
    result_reset(result);
    const struct memory *memory = &destination->memory;
    for (uint32_t r = 0; r < memory->region_count; r++) {
        int error_number = memory->regions[r].is_hugetlb ? place_reserve(&memory->regions[r]) : 0;
        if (error_number != 0) {
            result_fail(result, LOOP_MEMORY_FAILED, error_number, "reserve");
            result->region = r;
            return;
        }
    }
    for (uint32_t r = 0; r < memory->region_count; r++)
        if (memory->regions[r].is_hugetlb && !allocate_all(&memory->regions[r], destination->stop_fd, result)) {
            result->region = r;
            return;
        }
    result->reason = LOOP_FINISHED;
}
