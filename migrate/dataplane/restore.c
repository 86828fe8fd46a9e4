/* Page states outlive the daemon: they lie in a memfd that the daemon makes and the guest keeps, and come back with the guest.
 *
 * The daemon maps it, then seals it: F_SEAL_FUTURE_WRITE leaves its own mapping writable and gives nobody else one, F_SEAL_SHRINK
 * spares it the SIGBUS of a file cut short. So a daemon that takes the guest back cannot go on in the old file: it reads that, and
 * makes one of its own, which the guest must have before anything is placed, since a page that an old file calls lacking, and that
 * the guest has written since, would be overwritten.
 *
 * What is read back is input. Any byte is survivable: what is not a final state counts as ABSENT (asking the source is always right),
 * no counter is believed, and a lie hurts the guest that told it. RECEIVING is a copy that nobody will end: ABSENT; if it was
 * DISCARDED, the guest has been told that it reads zero. Which chunks of a large page have come is not kept: all are lacking.
 * What the dead daemon had read from the userfaultfd is lost with it: UFFDIO_WAKE makes those threads fault again.
 *
 * Two daemons never write one guest's memory: each holds a POSIX record lock on the file for as long as it lives, stopped or not. (An open
 * file description's lock would be shared with whoever has the descriptor.) The kernel drops it when its holder closes any
 * descriptor of the file, so the plane opens none. tests/path/restore_main.c, tests/failure/test_restart.py. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include "destination.h"
#include "resolve.h"
#include "result.h"

#define SEALS (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL)
#define READ_BYTES 4096

int states_lock(int states_fd, int *owner_pid)
{
    struct flock whole = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    *owner_pid = 0;
    if (fcntl(states_fd, F_SETLK, &whole) == 0)
        return 0;
    int error_number = errno;
    if (error_number == EACCES)
        error_number = EAGAIN;
    if (error_number == EAGAIN && fcntl(states_fd, F_GETLK, &whole) == 0 && whole.l_type != F_UNLCK)
        *owner_pid = whole.l_pid;
    return error_number;
}

int states_init(struct destination *destination)
{
    uint64_t page_total = destination->memory.page_total;
    int nobody;
    destination->states_fd = memfd_create("postcopy-page-states", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (destination->states_fd < 0 || ftruncate(destination->states_fd, (off_t)page_total) < 0)
        return errno;
    void *states = mmap(NULL, page_total, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, destination->states_fd, 0);
    if (states == MAP_FAILED)
        return errno;
    destination->state = states;
    if (fcntl(destination->states_fd, F_ADD_SEALS, SEALS) < 0)
        return errno;
    return states_lock(destination->states_fd, &nobody);
}

void states_deinit(struct destination *destination)
{
    if (destination->state)
        munmap((void *)destination->state, destination->memory.page_total);
    if (destination->states_fd >= 0)
        close(destination->states_fd);
}

int destination_states_fd(const struct destination *destination)
{
    return destination->states_fd;
}

/* What a byte of an earlier life still says. */
static enum page_state state_of(uint8_t byte)
{
    switch (PAGE_STATE(byte)) {
    case PAGE_PRESENT:
    case PAGE_MAPPED:
    case PAGE_HELD:
    case PAGE_HELD_ZERO:
    case PAGE_ZERO:
    case PAGE_REMOVED:
        return (enum page_state)PAGE_STATE(byte);
    case PAGE_RECEIVING:
        return byte & PAGE_DISCARDED ? PAGE_REMOVED : PAGE_ABSENT;
    default:
        return PAGE_ABSENT;
    }
}

/* Anything may be in the file where a page is not final: if it turns out zero, it is cleared. */
static void file_may_hold(struct destination *destination, const struct region *region, uint64_t page_index)
{
    atomic_fetch_or_explicit(&destination->copies[region->first_page + page_index], COPY_IN_FILE, memory_order_relaxed);
    if (region->page_chunks > 0)
        claims_restore(&destination->claims, region, page_index);
}

static bool restore_page(struct destination *destination, const struct region *region, uint64_t page_index, uint8_t byte,
                         struct loop_result *result)
{
    enum page_state state = state_of(byte);
    bool held = state == PAGE_HELD || state == PAGE_HELD_ZERO;
    if (state == PAGE_REMOVED && PAGE_STATE(byte) == PAGE_RECEIVING) {
        int error_number = place_hole(region, page_index, 1);
        if (error_number != 0)
            return result_fail(result, LOOP_MEMORY_FAILED, error_number, "discard");
    }
    if (state == PAGE_ABSENT || held)
        file_may_hold(destination, region, page_index);
    if (held) {
        count(&destination->pages_held, 1);
        atomic_store_explicit(&destination->marks, destination->streams, memory_order_relaxed); /* the stale set is still to be told */
    } else if (state != PAGE_ABSENT) {
        count(&destination->pages_restored, 1);
        destination_became_final(destination, 1);
    }
    atomic_store_explicit(&destination->state[region->first_page + page_index], (uint8_t)state, memory_order_release);
    return true;
}

static bool restore_region(struct destination *destination, const struct region *region, int states_fd, struct loop_result *result)
{
    uint8_t bytes[READ_BYTES];
    for (uint64_t done = 0; done < region->page_count;) {
        uint64_t most = region->page_count - done < READ_BYTES ? region->page_count - done : READ_BYTES;
        ssize_t read_bytes = pread(states_fd, bytes, most, (off_t)(region->first_page + done));
        if (read_bytes < 0 && errno == EINTR)
            continue;
        if (read_bytes < (ssize_t)most) /* cut short, or no file: what it does not say is lacking */
            memset(bytes + (read_bytes > 0 ? read_bytes : 0), PAGE_ABSENT, most - (uint64_t)(read_bytes > 0 ? read_bytes : 0));
        for (uint64_t i = 0; i < most; i++)
            if (!restore_page(destination, region, done + i, bytes[i], result))
                return false;
        done += most;
    }
    return true;
}

void destination_restore(struct destination *destination, int states_fd, struct loop_result *result)
{
    result_reset(result);
    destination->recovering = true;
    for (uint32_t r = 0; r < destination->memory.region_count; r++)
        if (!restore_region(destination, &destination->memory.regions[r], states_fd, result))
            return;
    result->reason = LOOP_FINISHED;
}

void destination_wake(struct destination *destination)
{
    for (uint32_t r = 0; r < destination->memory.region_count; r++)
        resolve_wake(destination->userfaultfd, &destination->memory.regions[r], 0, destination->memory.regions[r].page_count);
}
