/* See place.h. Three ways, each where it is cheapest and cannot raise a signal:
 *   store into the alias   one urgent 4 KiB page: pwrite would queue behind the bulk loop's on the inode's lock
 *   pwrite                 runs of 4 KiB pages: skips zeroing fresh pages and the alias' own page-table entries
 *   process_vm_writev      hugetlbfs, where pwrite is EINVAL: an absent huge page is EFAULT here, SIGBUS to a store */
#include "place.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static int write_file(const struct region *region, uint64_t start_bytes, const char *bytes, size_t size_bytes)
{
    uint64_t offset_bytes = region->memory.offset_bytes + start_bytes;
    while (size_bytes > 0) {
        ssize_t written_bytes = pwrite(region->memory.memory_fd, bytes, size_bytes, (off_t)offset_bytes);
        if (written_bytes < 0 && errno == EINTR)
            continue;
        if (written_bytes <= 0)
            return written_bytes < 0 ? errno : EIO;
        bytes += written_bytes;
        offset_bytes += (uint64_t)written_bytes;
        size_bytes -= (size_t)written_bytes;
    }
    return 0;
}

static int copy_to(char *alias, const char *bytes, size_t size_bytes)
{
    while (size_bytes > 0) {
        struct iovec from = {(void *)(uintptr_t)bytes, size_bytes}, to = {alias, size_bytes};
        ssize_t copied_bytes = process_vm_writev(getpid(), &from, 1, &to, 1, 0);
        if (copied_bytes <= 0)
            return copied_bytes < 0 ? errno : EFAULT;
        bytes += copied_bytes;
        alias += copied_bytes;
        size_bytes -= (size_t)copied_bytes;
    }
    return 0;
}

static int place_bytes(const struct region *region, uint64_t start_bytes, size_t size_bytes, const void *bytes, enum page_path path)
{
    if (region->is_hugetlb)
        return copy_to(region->alias + start_bytes, bytes, size_bytes);
    if (path == PATH_URGENT && region->alias) {
        memcpy(region->alias + start_bytes, bytes, size_bytes);
        return 0;
    }
    return write_file(region, start_bytes, bytes, size_bytes);
}

int place_pages(const struct region *region, uint64_t page_index, uint64_t page_count, const void *bytes, enum page_path path)
{
    return place_bytes(region, page_index * region->memory.page_bytes, page_count * region->memory.page_bytes, bytes, path);
}

int place_chunk(const struct region *region, uint64_t chunk_index, const void *bytes, enum page_path path)
{
    return place_bytes(region, chunk_index * FRAME_CHUNK_BYTES, FRAME_CHUNK_BYTES, bytes, path);
}

static int allocate(const struct region *region, int mode, uint64_t start_bytes, uint64_t size_bytes)
{
    while (fallocate(region->memory.memory_fd, mode, (off_t)(region->memory.offset_bytes + start_bytes), (off_t)size_bytes) < 0)
        if (errno != EINTR)
            return errno;
    return 0;
}

/* A hole would give the reservation back, and another guest could take the page: what comes later would be SIGBUS. */
static int clear_hugetlb(const struct region *region, uint64_t start_bytes, uint64_t size_bytes)
{
    static const char zeroes[64 << 10];
    for (uint64_t done_bytes = 0; done_bytes < size_bytes; done_bytes += sizeof(zeroes)) {
        int error_number = copy_to(region->alias + start_bytes + done_bytes, zeroes, sizeof(zeroes));
        if (error_number != 0)
            return error_number;
    }
    return 0;
}

int place_hole(const struct region *region, uint64_t page_index, uint64_t page_count)
{
    uint64_t page_bytes = region->memory.page_bytes;
    return allocate(region, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page_index * page_bytes, page_count * page_bytes);
}

static int zero_bytes(const struct region *region, uint64_t start_bytes, uint64_t size_bytes)
{
    return region->is_hugetlb ? clear_hugetlb(region, start_bytes, size_bytes)
                              : allocate(region, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start_bytes, size_bytes);
}

int place_zeroes(const struct region *region, uint64_t page_index, uint64_t page_count)
{
    return zero_bytes(region, page_index * region->memory.page_bytes, page_count * region->memory.page_bytes);
}

int place_zero_chunk(const struct region *region, uint64_t chunk_index)
{
    return zero_bytes(region, chunk_index * FRAME_CHUNK_BYTES, FRAME_CHUNK_BYTES);
}

int memory_discard(const struct memory_region *region, uint64_t page_index, uint64_t page_count)
{
    struct region discarded = {.memory = *region};
    return place_hole(&discarded, page_index, page_count);
}

/* Is there a page? hugetlbfs has no SEEK_DATA: there any page of the file counts. */
static bool holds_something(const struct region *region)
{
    struct stat status;
    if (region->is_hugetlb)
        return fstat(region->memory.memory_fd, &status) < 0 || status.st_blocks > 0;
    off_t first_bytes = lseek(region->memory.memory_fd, (off_t)region->memory.offset_bytes, SEEK_DATA);
    if (first_bytes < 0)
        return errno != ENXIO; /* none behind that offset */
    return (uint64_t)first_bytes < region->memory.offset_bytes + region->memory.size_bytes;
}

int place_nothing(const struct region *region)
{
    if (!holds_something(region))
        return 0;
    int error_number = place_hole(region, 0, region->page_count);
    if (error_number == 0 && region->is_hugetlb)
        place_reserve(region); /* what the punch gave back; where another has it already, the next migration says so (room.c) */
    return error_number;
}

int place_reserve(const struct region *region)
{
    void *mapping = mmap(NULL, region->memory.size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, region->memory.memory_fd,
                         (off_t)region->memory.offset_bytes);
    if (mapping == MAP_FAILED)
        return errno;
    munmap(mapping, region->memory.size_bytes);
    return 0;
}

int place_allocate(const struct region *region, uint64_t page_index, uint64_t page_count)
{
    return allocate(region, 0, page_index * region->memory.page_bytes, page_count * region->memory.page_bytes);
}
