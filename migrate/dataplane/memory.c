/* See memory.h.
 *
 * A guest can truncate its own file: a store through the alias beyond its end is SIGBUS, which would end every guest's
 * daemon. So an alias exists only where F_SEAL_SHRINK holds (memfds); other files are filled by system calls (place.c). */
#include "memory.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include "../uffd/kernel.h"

int memory_init(struct memory *memory, const struct memory_region *regions, uint32_t region_count)
{
    memset(memory, 0, sizeof(*memory));
    if (region_count == 0 || region_count > REGIONS_MAX)
        return EINVAL;
    for (uint32_t i = 0; i < region_count; i++) {
        const struct memory_region *given = &regions[i];
        bool page_size_known = given->page_bytes == 4096 || given->page_bytes == 2u << 20;
        if (!page_size_known || given->size_bytes == 0 || given->size_bytes % given->page_bytes != 0 ||
            given->offset_bytes % given->page_bytes != 0 || given->guest_address % given->page_bytes != 0 ||
            given->size_bytes > (UINT64_C(1) << 50) || given->offset_bytes > (UINT64_C(1) << 50))
            return EINVAL;
        struct statfs filesystem;
        if (fstatfs(given->memory_fd, &filesystem) < 0)
            return errno;
        struct region *region = &memory->regions[i];
        region->memory = *given;
        region->first_page = memory->page_total;
        region->page_count = given->size_bytes / given->page_bytes;
        region->is_hugetlb = filesystem.f_type == HUGETLBFS_MAGIC;
        memory->page_total += region->page_count;
        if (given->page_bytes > memory->page_bytes_max)
            memory->page_bytes_max = given->page_bytes;
    }
    memory->region_count = region_count;
    return 0;
}

/* 0 when the region lies within its file, for good if the file is sealed. */
static int check_size(const struct region *region)
{
    struct stat status;
    if (fstat(region->memory.memory_fd, &status) < 0)
        return errno;
    return region->memory.offset_bytes + region->memory.size_bytes <= (uint64_t)status.st_size ? 0 : EINVAL;
}

static bool sealed_against_shrinking(int memory_fd)
{
    if (fcntl(memory_fd, F_ADD_SEALS, F_SEAL_SHRINK) == 0)
        return true;
    int seals = fcntl(memory_fd, F_GET_SEALS);
    return seals >= 0 && (seals & F_SEAL_SHRINK);
}

int memory_map_aliases(struct memory *memory)
{
    for (uint32_t i = 0; i < memory->region_count; i++) {
        struct region *region = &memory->regions[i];
        bool sealed = sealed_against_shrinking(region->memory.memory_fd);
        int error_number = check_size(region); /* after the seal: the guest may have truncated it since it said hello */
        if (error_number != 0)
            return error_number;
        /* A hugetlb store can also fail for want of a huge page, so its alias is only written by system calls (place.c). */
        if (!sealed && !region->is_hugetlb)
            continue;
        int flags = MAP_SHARED | (region->is_hugetlb ? MAP_NORESERVE : 0); /* huge pages are asked for once, where it can be said: room.c */
        void *alias = mmap(NULL, region->memory.size_bytes, PROT_READ | PROT_WRITE, flags, region->memory.memory_fd,
                           (off_t)region->memory.offset_bytes);
        if (alias == MAP_FAILED)
            return errno;
        madvise(alias, region->memory.size_bytes, MADV_DONTDUMP);
        region->alias = alias;
    }
    return 0;
}

void memory_deinit(struct memory *memory)
{
    for (uint32_t i = 0; i < memory->region_count; i++)
        if (memory->regions[i].alias)
            munmap(memory->regions[i].alias, memory->regions[i].memory.size_bytes);
    memory->region_count = 0;
}

const struct region *memory_at_page(const struct memory *memory, uint64_t page)
{
    const struct region *region = memory->regions;
    while (page >= region->first_page + region->page_count)
        region++;
    return region;
}

const struct region *memory_at_address(const struct memory *memory, uint64_t address)
{
    for (uint32_t i = 0; i < memory->region_count; i++) {
        const struct region *region = &memory->regions[i];
        if (address - region->memory.guest_address < region->memory.size_bytes)
            return region;
    }
    return NULL;
}
