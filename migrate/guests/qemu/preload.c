/* LD_PRELOADed into QEMU: registers its guest memory with userfaultfd, which only the process itself can do.
 *
 * Where the guest waits, registering must come before anything touches the memory: a page that is mapped already never
 * faults. So it happens inside QEMU's own mmap() of the memory file, the only call that is interposed (preload_mmap.c), before QEMU
 * has the address. A running guest is registered when a migration asks for it (PRELOAD_TRACK).
 *
 * One thread takes the agent's commands; it never touches guest memory and has all signals blocked. The userfaultfd of a guest
 * that arrives stays open here until PRELOAD_WHOLE: with the last descriptor gone, absent pages would read as zeroes.
 * A program without the memory file (a wrapper before QEMU, a child of it) only carries this object along.
 *
 * When the agent's end is gone nobody can pause or resume this VM, and nobody else knows of it: it is told to end (SIGTERM),
 * and where it cannot, because it waits for a page that will never come, it is ended. */
#include "preload.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include "../../uffd/kernel.h"
#include "../../uffd/uffd.h"

#define END_MS 3000 /* how long QEMU may take to end by itself */
#define FEATURES_ARRIVE \
    (UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS)
#define FEATURES_TRACK (UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED)

static struct {
    int socket_fd; /* -1: no memory file is to be looked for */
    unsigned long long device, inode;
    char role;
    int arriving_fd, tracking_fd;
    uint64_t address, size_bytes; /* of the mapping; 0: none yet */
} state = {.socket_fd = -1, .arriving_fd = -1, .tracking_fd = -1};

__attribute__((constructor)) static void read_environment(void)
{
    const char *text = getenv(PRELOAD_ENVIRONMENT);
    int socket_fd;
    if (text != NULL && sscanf(text, "%d:%llu:%llu:%c", &socket_fd, &state.device, &state.inode, &state.role) == 4)
        state.socket_fd = socket_fd;
}

/* A report that the agent does not read is one of an agent that is gone: the thread sees that. */
static void report(struct preload_report *message, int attached_fd)
{
    struct iovec part = {.iov_base = message, .iov_len = sizeof(*message)};
    union {
        struct cmsghdr header;
        char room[CMSG_SPACE(sizeof(int))];
    } control = {0};
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1};
    if (attached_fd >= 0) {
        header.msg_control = &control;
        header.msg_controllen = sizeof(control);
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        memcpy(CMSG_DATA(rights), &attached_fd, sizeof(int));
    }
    while (sendmsg(state.socket_fd, &header, MSG_NOSIGNAL) < 0 && errno == EINTR)
        ;
}

static int failed(struct preload_report *message, const char *step, int error_number)
{
    message->error_number = error_number;
    snprintf(message->step, sizeof(message->step), "%s", step);
    return -1;
}

/* A userfaultfd with the features over the mapping; -1 with the report filled in. Faults that the kernel takes for QEMU
 * (read(2) of a disk into guest memory) must be told too: user_mode_only will not do where pages are absent. */
static int open_registered(struct preload_report *message, uint64_t features, uint64_t modes, int user_mode_too)
{
    struct uffd_opened opened;
    uffd_open(0, &opened);
    if (opened.fd < 0 && user_mode_too)
        uffd_open(1, &opened);
    if (opened.fd < 0)
        return failed(message, "userfaultfd", opened.syscall_errno);
    uint64_t ioctls;
    const char *step = "UFFDIO_API";
    int error_number = uffd_api(opened.fd, &features);
    if (error_number == 0) {
        step = "UFFDIO_REGISTER";
        error_number = uffd_register(opened.fd, state.address, state.size_bytes, modes, &ioctls);
    }
    if (error_number == 0)
        return opened.fd;
    close(opened.fd);
    return failed(message, step, error_number);
}

static void let_go(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

static void track(void)
{
    struct preload_report message = {.kind = PRELOAD_TRACKING};
    let_go(&state.tracking_fd);
    state.tracking_fd = open_registered(&message, FEATURES_TRACK, UFFDIO_REGISTER_MODE_WP, 1);
    int pagemap_fd = state.tracking_fd < 0 ? -1 : open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    if (state.tracking_fd >= 0 && pagemap_fd < 0)
        failed(&message, "/proc/self/pagemap", errno);
    report(&message, pagemap_fd);
    let_go(&pagemap_fd);
}

static void *serve_agent(void *unused)
{
    uint32_t command;
    ssize_t got;
    while ((got = recv(state.socket_fd, &command, sizeof(command), MSG_TRUNC)) != 0) { /* its whole size, however much has room */
        if (got < 0 && errno != EINTR)
            break;
        if (got != sizeof(command))
            continue;
        if (command == PRELOAD_TRACK)
            track();
        else if (command == PRELOAD_UNTRACK)
            let_go(&state.tracking_fd);
        else if (command == PRELOAD_WHOLE)
            let_go(&state.arriving_fd);
    }
    kill(getpid(), SIGTERM);
    poll(NULL, 0, END_MS);
    kill(getpid(), SIGKILL);
    return unused;
}

static void start_thread(struct preload_report *message)
{
    fcntl(state.socket_fd, F_SETFD, FD_CLOEXEC); /* a child of QEMU must not keep the connection up */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    int error_number = pthread_create(&thread, NULL, serve_agent, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error_number != 0)
        failed(message, "pthread_create", error_number);
}

static void take_mapping(void *address, size_t size_bytes, off_t offset_bytes)
{
    struct preload_report message = {
        .kind = PRELOAD_MAPPED, .address = (uintptr_t)address, .size_bytes = size_bytes, .offset_bytes = (uint64_t)offset_bytes};
    if (state.size_bytes != 0) { /* through a second one QEMU would read zeroes, and what it writes would not be seen */
        failed(&message, "a second mapping of the memory", EBUSY);
        report(&message, -1);
        return;
    }
    state.address = message.address;
    state.size_bytes = size_bytes;
    if (madvise(address, size_bytes, MADV_DONTFORK) < 0) /* a child's mapping would not be registered */
        failed(&message, "MADV_DONTFORK", errno);
    else if (state.role == 'w')
        state.arriving_fd = open_registered(&message, FEATURES_ARRIVE, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR, 0);
    if (message.error_number == 0)
        start_thread(&message);
    report(&message, message.error_number == 0 ? state.arriving_fd : -1);
}

static int is_memory_file(int fd)
{
    struct stat info;
    return state.socket_fd >= 0 && fd >= 0 && fstat(fd, &info) == 0 && info.st_dev == state.device && info.st_ino == state.inode;
}

void preload_mapped(void *address, size_t size_bytes, int fd, off_t offset_bytes)
{
    if (is_memory_file(fd))
        take_mapping(address, size_bytes, offset_bytes);
}
