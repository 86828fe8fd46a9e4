/* postcopy-trial NAME: one kernel feature, used for real in a process of its own, so that what goes wrong ends with it.
 *
 *   minor-user     a fault of this program, on shmem, resolved by UFFDIO_CONTINUE
 *   minor-kernel   the same, taken inside write(2): what KVM needs too
 *   minor-hugetlb  the same on one 2 MiB page, which must be free
 *   dirty          write protection that the kernel lifts by itself (WP_ASYNC), read by PAGEMAP_SCAN
 *   soft-dirty     /proc/self/clear_refs accepts the request also where nothing comes of it: so write, and look
 *   poison         UFFDIO_POISON, then SIGBUS
 *   move           UFFDIO_MOVE of a private anonymous page
 *   kvm            /dev/kvm opens, speaks API version 12 and makes a virtual machine
 *   pacing         a TCP socket takes SO_MAX_PACING_RATE and keeps it
 *
 * Exit status 0: it works. 1: it does not, and standard output says "STEP ERRNO" (0: the call succeeded and did something
 * else). No privilege is needed, and nothing remains. */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <linux/memfd.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "kernel.h"
#include "uffd.h"

#define LIFE_SECONDS 10
#define EVENT_TIMEOUT_MS 5000
#define PAGE_BYTES ((uint64_t)4096)
#define HUGEPAGE_BYTES ((uint64_t)2 << 20)
#define MARK UINT64_C(0x706f7374636f7079)
#define SOFT_DIRTY_BIT 55

_Noreturn static void fails(const char *step, int error_number)
{
    printf("%s %d\n", step, error_number);
    exit(1);
}

static void require(int held, const char *step)
{
    if (!held)
        fails(step, errno);
}

static void *map(int memory_fd, uint64_t size_bytes)
{
    int flags = memory_fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED;
    void *address = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, flags, memory_fd, 0);
    require(address != MAP_FAILED, "mmap");
    return address;
}

static int memory_file(uint64_t size_bytes, unsigned int flags)
{
    int memory_fd = memfd_create("postcopy-trial", MFD_CLOEXEC | flags);
    require(memory_fd >= 0, "memfd_create");
    require(ftruncate(memory_fd, (off_t)size_bytes) == 0, "ftruncate");
    return memory_fd;
}

static int userfaultfd(int user_mode_only, uint64_t features)
{
    struct uffd_opened opened;
    uffd_open(user_mode_only, &opened);
    if (opened.fd < 0)
        fails("userfaultfd", opened.syscall_errno);
    int error_number = uffd_api(opened.fd, &features);
    if (error_number != 0)
        fails("UFFDIO_API", error_number);
    return opened.fd;
}

static void registers(int fd, void *address, uint64_t size_bytes, uint64_t modes)
{
    uint64_t ioctls;
    int error_number = uffd_register(fd, (uint64_t)(uintptr_t)address, size_bytes, modes, &ioctls);
    if (error_number != 0)
        fails("UFFDIO_REGISTER", error_number);
}

/* ---- minor faults ---- */

struct touch {
    const volatile uint64_t *page;
    int pipe_fds[2]; /* the kernel reads the page in write(2); unused by a fault of our own */
    int by_kernel;
    uint64_t seen;
    int error_number;
};

static void *touch_page(void *argument)
{
    struct touch *touch = argument;
    if (!touch->by_kernel)
        touch->seen = *touch->page;
    else if (write(touch->pipe_fds[1], (const void *)(uintptr_t)touch->page, sizeof touch->seen) != (ssize_t)sizeof touch->seen ||
             read(touch->pipe_fds[0], &touch->seen, sizeof touch->seen) != (ssize_t)sizeof touch->seen)
        touch->error_number = errno;
    return NULL;
}

static void minor(int by_kernel, uint64_t page_bytes, unsigned int memfd_flags, uint64_t features)
{
    int memory_fd = memory_file(page_bytes, memfd_flags);
    char *guest = map(memory_fd, page_bytes), *alias = map(memory_fd, page_bytes);
    int fd = userfaultfd(!by_kernel, features);
    registers(fd, guest, page_bytes, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
    memcpy(alias, &(uint64_t){MARK}, sizeof(uint64_t));

    struct touch touch = {.page = (const uint64_t *)(const void *)guest, .by_kernel = by_kernel};
    require(pipe(touch.pipe_fds) == 0, "pipe");
    pthread_t thread;
    errno = pthread_create(&thread, NULL, touch_page, &touch);
    require(errno == 0, "pthread_create");
    struct pollfd ready = {.fd = fd, .events = POLLIN};
    struct uffd_msg message;
    errno = 0;
    require(poll(&ready, 1, EVENT_TIMEOUT_MS) == 1, "poll");
    require(read(fd, &message, sizeof message) == (ssize_t)sizeof message, "read");
    if (message.event != UFFD_EVENT_PAGEFAULT || !(message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_MINOR))
        fails("minor-fault", 0);
    struct uffdio_continue request = {.range = {.start = (uint64_t)(uintptr_t)guest, .len = page_bytes}};
    require(ioctl(fd, UFFDIO_CONTINUE, &request) == 0, "UFFDIO_CONTINUE");
    pthread_join(thread, NULL);
    if (touch.error_number != 0 || touch.seen != MARK)
        fails("touch", touch.error_number);
}

static void minor_user(void)
{
    minor(0, PAGE_BYTES, 0, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);
}

static void minor_kernel(void)
{
    minor(1, PAGE_BYTES, 0, UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_MINOR_SHMEM);
}

static void minor_hugetlb(void)
{
    minor(0, HUGEPAGE_BYTES, MFD_HUGETLB | MFD_HUGE_2MB, UFFD_FEATURE_MISSING_HUGETLBFS | UFFD_FEATURE_MINOR_HUGETLBFS);
}

/* ---- which pages were written ---- */

enum { SCANNED_PAGES = 8, WRITTEN_PAGE = 5 };

/* Get and clear. Returns the number of written ranges, of which the first is stored. */
static int scan(int pagemap_fd, char *address, struct page_region *first)
{
    struct page_region found[SCANNED_PAGES];
    struct pm_scan_arg request = {
        .size = sizeof request,
        .flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
        .start = (uint64_t)(uintptr_t)address,
        .end = (uint64_t)(uintptr_t)(address + SCANNED_PAGES * PAGE_BYTES),
        .vec = (uint64_t)(uintptr_t)found,
        .vec_len = SCANNED_PAGES,
        .category_mask = PAGE_IS_WRITTEN,
        .return_mask = PAGE_IS_WRITTEN,
    };
    int ranges = ioctl(pagemap_fd, PAGEMAP_SCAN, &request);
    require(ranges >= 0, "PAGEMAP_SCAN");
    if (ranges > 0)
        *first = found[0];
    return ranges;
}

static void dirty(void)
{
    int memory_fd = memory_file(SCANNED_PAGES * PAGE_BYTES, 0);
    char *guest = map(memory_fd, SCANNED_PAGES * PAGE_BYTES);
    int fd = userfaultfd(1, UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_HUGETLBFS_SHMEM | UFFD_FEATURE_WP_UNPOPULATED);
    registers(fd, guest, SCANNED_PAGES * PAGE_BYTES, UFFDIO_REGISTER_MODE_WP);
    int pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    require(pagemap_fd >= 0, "/proc/self/pagemap");
    struct page_region first;
    scan(pagemap_fd, guest, &first); /* arms */
    if (scan(pagemap_fd, guest, &first) != 0)
        fails("clean-pages", 0);
    guest[WRITTEN_PAGE * PAGE_BYTES] = 1;
    uint64_t written = (uint64_t)(uintptr_t)guest + WRITTEN_PAGE * PAGE_BYTES;
    if (scan(pagemap_fd, guest, &first) != 1 || first.start != written || first.end != written + PAGE_BYTES)
        fails("written-page", 0);
}

static int is_soft_dirty(int pagemap_fd, const char *page)
{
    uint64_t entry;
    off_t offset = (off_t)((uintptr_t)page / PAGE_BYTES * sizeof entry);
    require(pread(pagemap_fd, &entry, sizeof entry, offset) == (ssize_t)sizeof entry, "/proc/self/pagemap");
    return (int)(entry >> SOFT_DIRTY_BIT & 1);
}

static void soft_dirty(void)
{
    char *page = map(-1, PAGE_BYTES);
    page[0] = 1;
    int clear_fd = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);
    int pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    require(clear_fd >= 0 && write(clear_fd, "4", 1) == 1, "/proc/self/clear_refs");
    require(pagemap_fd >= 0, "/proc/self/pagemap");
    if (is_soft_dirty(pagemap_fd, page))
        fails("clean-page", 0);
    page[0] = 2;
    if (!is_soft_dirty(pagemap_fd, page))
        fails("written-page", 0);
}

/* ---- poison, move ---- */

static sigjmp_buf touched;

static void on_sigbus(int signal_number)
{
    (void)signal_number;
    siglongjmp(touched, 1);
}

static void poison(void)
{
    char *guest = map(memory_file(PAGE_BYTES, 0), PAGE_BYTES);
    int fd = userfaultfd(1, UFFD_FEATURE_POISON);
    registers(fd, guest, PAGE_BYTES, UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR);
    struct uffdio_poison request = {.range = {.start = (uint64_t)(uintptr_t)guest, .len = PAGE_BYTES}};
    require(ioctl(fd, UFFDIO_POISON, &request) == 0, "UFFDIO_POISON");
    struct sigaction action = {.sa_handler = on_sigbus};
    require(sigaction(SIGBUS, &action, NULL) == 0, "sigaction");
    if (sigsetjmp(touched, 1) != 0)
        return;
    (void)*(volatile char *)guest;
    fails("poisoned-page", 0);
}

static void move(void)
{
    char *from = map(-1, PAGE_BYTES), *to = map(-1, PAGE_BYTES);
    int fd = userfaultfd(1, UFFD_FEATURE_MOVE);
    registers(fd, to, PAGE_BYTES, UFFDIO_REGISTER_MODE_MISSING);
    memcpy(from, &(uint64_t){MARK}, sizeof(uint64_t));
    struct uffdio_move request = {.dst = (uint64_t)(uintptr_t)to, .src = (uint64_t)(uintptr_t)from, .len = PAGE_BYTES};
    require(ioctl(fd, UFFDIO_MOVE, &request) == 0, "UFFDIO_MOVE");
    if (*(const volatile uint64_t *)(const void *)to != MARK)
        fails("moved-page", 0);
}

/* ---- beyond memory ---- */

static void kvm(void)
{
    int kvm_fd = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    require(kvm_fd >= 0, "/dev/kvm");
    int version = ioctl(kvm_fd, KVM_GET_API_VERSION, 0);
    require(version >= 0, "KVM_GET_API_VERSION");
    if (version != KVM_API_VERSION)
        fails("KVM_GET_API_VERSION", 0);
    require(ioctl(kvm_fd, KVM_CREATE_VM, 0) >= 0, "KVM_CREATE_VM");
}

static void pacing(void)
{
    uint64_t wanted = 100 << 20, got = 0;
    socklen_t size_bytes = sizeof got;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    require(fd >= 0, "socket");
    require(setsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &wanted, sizeof wanted) == 0, "SO_MAX_PACING_RATE");
    require(getsockopt(fd, SOL_SOCKET, SO_MAX_PACING_RATE, &got, &size_bytes) == 0, "SO_MAX_PACING_RATE");
    if (memcmp(&got, &wanted, size_bytes) != 0)
        fails("SO_MAX_PACING_RATE", 0);
}

static const struct {
    const char *name;
    void (*run)(void);
} trials[] = {
    {"minor-user", minor_user}, {"minor-kernel", minor_kernel}, {"minor-hugetlb", minor_hugetlb},
    {"dirty", dirty},           {"soft-dirty", soft_dirty},     {"poison", poison},
    {"move", move},             {"kvm", kvm},                   {"pacing", pacing},
};

int main(int count, char **arguments)
{
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* whoever waits for the answer sets the deadline; these two are for when he is gone */
    alarm(LIFE_SECONDS);
    for (size_t i = 0; count == 2 && i < sizeof trials / sizeof *trials; i++) {
        if (strcmp(arguments[1], trials[i].name) == 0) {
            trials[i].run();
            return 0;
        }
    }
    fprintf(stderr, "usage: postcopy-trial NAME (see trial.c)\n");
    return 2;
}
