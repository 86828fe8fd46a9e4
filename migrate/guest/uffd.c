/* See uffd.h. Sources: Linux Documentation/admin-guide/mm/userfaultfd.rst, fs/userfaultfd.c. */
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "../dataplane/kernel.h"

#define MAPPING_ALIGNMENT_BYTES (UINT64_C(2) << 20)

void uffd_open(int user_mode_only, struct uffd_opened *opened)
{
    int flags = O_CLOEXEC | O_NONBLOCK | (user_mode_only ? UFFD_USER_MODE_ONLY : 0);
    *opened = (struct uffd_opened){.fd = -1};
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device >= 0) {
        opened->fd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
        opened->device_errno = opened->fd < 0 ? errno : 0;
        close(device);
    } else {
        opened->device_errno = errno;
    }
    if (opened->fd >= 0)
        return;
    opened->fd = (int)syscall(SYS_userfaultfd, flags);
    opened->syscall_errno = opened->fd < 0 ? errno : 0;
}

int uffd_api(int fd, uint64_t *features)
{
    struct uffdio_api api = {.api = UFFD_API, .features = *features};
    if (ioctl(fd, UFFDIO_API, &api) < 0)
        return errno;
    *features = api.features;
    return 0;
}

int uffd_register(int fd, uint64_t address, uint64_t size_bytes, uint64_t modes, uint64_t *ioctls)
{
    struct uffdio_register request = {.range = {.start = address, .len = size_bytes}, .mode = modes};
    if (ioctl(fd, UFFDIO_REGISTER, &request) < 0)
        return errno;
    *ioctls = request.ioctls;
    return 0;
}

void *mapping_reserve(uint64_t size_bytes)
{
    uint64_t padded_bytes = size_bytes + MAPPING_ALIGNMENT_BYTES;
    char *reserved = mmap(NULL, padded_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        return NULL;
    uint64_t lead_bytes = -(uint64_t)(uintptr_t)reserved & (MAPPING_ALIGNMENT_BYTES - 1);
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
