/* See uffd.h. Sources: Linux Documentation/admin-guide/mm/userfaultfd.rst, fs/userfaultfd.c. */
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"

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
