/* See place.h. Three ways, each where it is cheapest and cannot raise a signal:
 *   store into the alias   one urgent 4 KiB page: pwrite would queue behind the bulk loop's on the inode's lock
 *   pwrite                 runs of 4 KiB pages: skips zeroing fresh pages and the alias' own page-table entries
 *   process_vm_writev      hugetlbfs, where pwrite is EINVAL: an absent huge page is EFAULT here, SIGBUS to a store */
#include "place.h"

#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static int write_file(const struct region *region, uint64_t page_index, const char *bytes, size_t size_bytes)
{
    uint64_t offset_bytes = region_file_offset(region, page_index);
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

static int copy_to_alias(const struct region *region, uint64_t page_index, const char *bytes, size_t size_bytes)
{
    char *alias = region->alias + page_index * region->memory.page_bytes;
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

int place_pages(const struct region *region, uint64_t page_index, uint64_t page_count, const void *bytes, enum page_path path)
{
    size_t size_bytes = page_count * region->memory.page_bytes;
    if (region->is_hugetlb)
        return copy_to_alias(region, page_index, bytes, size_bytes);
    if (path == PATH_URGENT && region->alias) {
        memcpy(region->alias + page_index * region->memory.page_bytes, bytes, size_bytes);
        return 0;
    }
    return write_file(region, page_index, bytes, size_bytes);
}
