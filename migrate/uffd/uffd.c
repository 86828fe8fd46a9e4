/* See uffd.h. Sources: Linux Documentation/admin-guide/mm/userfaultfd.rst and pagemap.rst, fs/userfaultfd.c, fs/proc/task_mmu.c. */
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

static int call(int fd, unsigned long number, void *argument)
{
    return ioctl(fd, number, argument) < 0 ? errno : 0;
}

int uffd_api_and_ioctls(int fd, uint64_t *features, uint64_t *ioctls)
{
    struct uffdio_api api = {.api = UFFD_API, .features = *features};
    int error_number = call(fd, UFFDIO_API, &api);
    if (error_number == 0) {
        *features = api.features;
        *ioctls = api.ioctls;
    }
    return error_number;
}

int uffd_api(int fd, uint64_t *features)
{
    uint64_t ioctls;
    return uffd_api_and_ioctls(fd, features, &ioctls);
}

int uffd_register(int fd, uint64_t address, uint64_t size_bytes, uint64_t modes, uint64_t *ioctls)
{
    struct uffdio_register request = {.range = {.start = address, .len = size_bytes}, .mode = modes};
    int error_number = call(fd, UFFDIO_REGISTER, &request);
    if (error_number == 0)
        *ioctls = request.ioctls;
    return error_number;
}

int uffd_unregister(int fd, uint64_t address, uint64_t size_bytes)
{
    struct uffdio_range range = {.start = address, .len = size_bytes};
    return call(fd, UFFDIO_UNREGISTER, &range);
}

int uffd_wake(int fd, uint64_t address, uint64_t size_bytes)
{
    struct uffdio_range range = {.start = address, .len = size_bytes};
    return call(fd, UFFDIO_WAKE, &range);
}

int uffd_writeprotect(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode)
{
    struct uffdio_writeprotect request = {.range = {.start = address, .len = size_bytes}, .mode = mode};
    return call(fd, UFFDIO_WRITEPROTECT, &request);
}

int uffd_copy(int fd, uint64_t to, uint64_t from, uint64_t size_bytes, uint64_t mode, int64_t *field)
{
    struct uffdio_copy request = {.dst = to, .src = from, .len = size_bytes, .mode = mode};
    int error_number = call(fd, UFFDIO_COPY, &request);
    *field = request.copy;
    return error_number;
}

int uffd_move(int fd, uint64_t to, uint64_t from, uint64_t size_bytes, uint64_t mode, int64_t *field)
{
    struct uffdio_move request = {.dst = to, .src = from, .len = size_bytes, .mode = mode};
    int error_number = call(fd, UFFDIO_MOVE, &request);
    *field = request.move;
    return error_number;
}

int uffd_zeropage(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode, int64_t *field)
{
    struct uffdio_zeropage request = {.range = {.start = address, .len = size_bytes}, .mode = mode};
    int error_number = call(fd, UFFDIO_ZEROPAGE, &request);
    *field = request.zeropage;
    return error_number;
}

int uffd_continue(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode, int64_t *field)
{
    struct uffdio_continue request = {.range = {.start = address, .len = size_bytes}, .mode = mode};
    int error_number = call(fd, UFFDIO_CONTINUE, &request);
    *field = request.mapped;
    return error_number;
}

int uffd_poison(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode, int64_t *field)
{
    struct uffdio_poison request = {.range = {.start = address, .len = size_bytes}, .mode = mode};
    int error_number = call(fd, UFFDIO_POISON, &request);
    *field = request.updated;
    return error_number;
}

static struct uffd_event flat(const struct uffd_msg *message)
{
    struct uffd_event event = {.event = message->event, .descriptor = -1};
    switch (message->event) {
    case UFFD_EVENT_PAGEFAULT:
        event.flags = message->arg.pagefault.flags;
        event.address = message->arg.pagefault.address;
        event.thread_id = message->arg.pagefault.feat.ptid;
        break;
    case UFFD_EVENT_FORK:
        event.descriptor = (int32_t)message->arg.fork.ufd;
        break;
    case UFFD_EVENT_REMAP:
        event.address = message->arg.remap.from;
        event.to = message->arg.remap.to;
        event.size_bytes = message->arg.remap.len;
        break;
    case UFFD_EVENT_REMOVE:
    case UFFD_EVENT_UNMAP:
        event.address = message->arg.remove.start;
        event.end = message->arg.remove.end;
        break;
    default:
        break;
    }
    return event;
}

int uffd_read(int fd, struct uffd_event *events, uint64_t events_max, uint64_t *count)
{
    struct uffd_msg messages[UFFD_READ_MAX];
    uint64_t most = events_max < UFFD_READ_MAX ? events_max : UFFD_READ_MAX;
    ssize_t got_bytes = read(fd, messages, most * sizeof(messages[0]));
    *count = got_bytes > 0 ? (uint64_t)got_bytes / sizeof(messages[0]) : 0;
    for (uint64_t i = 0; i < *count; i++)
        events[i] = flat(&messages[i]);
    return got_bytes < 0 ? errno : 0;
}

int pagemap_scan(int pagemap_fd, struct pm_scan_arg *argument, uint64_t *regions_count)
{
    argument->size = sizeof(*argument);
    int count = ioctl(pagemap_fd, PAGEMAP_SCAN, argument);
    *regions_count = count > 0 ? (uint64_t)count : 0;
    return count < 0 ? errno : 0;
}
