/* See mapping.h. */
#include "mapping.h"

#include <errno.h>
#include <stddef.h>
#include <sys/mman.h>

#define LARGE_BYTES (UINT64_C(1) << 30)
#define ALIGNMENT_BYTES (UINT64_C(2) << 20)

void *mapping_reserve(uint64_t size_bytes)
{
    uint64_t alignment_bytes = size_bytes >= LARGE_BYTES ? LARGE_BYTES : ALIGNMENT_BYTES; /* for the largest pages that fit */
    uint64_t padded_bytes = size_bytes + alignment_bytes;
    char *reserved = mmap(NULL, padded_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return NULL;
    uint64_t lead_bytes = -(uint64_t)(uintptr_t)reserved & (alignment_bytes - 1);
    if (lead_bytes > 0)
        munmap(reserved, lead_bytes);
    munmap(reserved + lead_bytes + size_bytes, padded_bytes - lead_bytes - size_bytes);
    return reserved + lead_bytes;
}

int mapping_place(void *address, uint64_t size_bytes, int memory_fd, uint64_t offset_bytes)
{
    int flags = MAP_SHARED | MAP_FIXED;
    if (mmap(address, size_bytes, PROT_READ | PROT_WRITE, flags, memory_fd, (off_t)offset_bytes) == MAP_FAILED)
        return errno;
    /* A fork child's mapping is not registered and would read zeroes. */
    return madvise(address, size_bytes, MADV_DONTFORK) < 0 ? errno : 0;
}

int mapping_release(void *address, uint64_t size_bytes)
{
    return munmap(address, size_bytes) < 0 ? errno : 0;
}
