/* Memory of the floor: the guest's (a memfd behind a userfaultfd that another process answers) and the source's. */
#include "floor.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/memfd.h>
#include <linux/userfaultfd.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

uint64_t floor_random(uint64_t *state) /* splitmix64 */
{
    uint64_t value = (*state += UINT64_C(0x9e3779b97f4a7c15));
    value = (value ^ (value >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    value = (value ^ (value >> 27)) * UINT64_C(0x94d049bb133111eb);
    return value ^ (value >> 31);
}

uint64_t floor_page_word(const struct floor_world *world, uint64_t page)
{
    uint64_t extent = world->options.seed ^ (page / EXTENT_PAGES << 20);
    if (floor_random(&extent) % 1000 < world->options.zero_per_mille)
        return 0;
    uint64_t content = world->options.seed + page;
    return floor_random(&content) | 1;
}

void *floor_allocate(size_t size_bytes)
{
    void *memory = malloc(size_bytes);
    floor_expect(memory != NULL, "malloc");
    return memset(memory, 0x5a, size_bytes);
}

static int create_memfd(const struct floor_world *world, uint64_t size_bytes, unsigned char **mapping)
{
    int memfd = memfd_create("postcopy-floor", MFD_CLOEXEC | (world->page_bytes == PAGE_BYTES ? 0 : MFD_HUGETLB | MFD_HUGE_2MB));
    floor_expect(memfd >= 0 && ftruncate(memfd, (off_t)size_bytes) == 0, "memfd");
    *mapping = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    floor_expect(*mapping != MAP_FAILED, "mmap");
    return memfd;
}

/* KVM's faults are taken inside the kernel. */
static int create_uffd(int kernel_faults)
{
    int flags = O_CLOEXEC | (kernel_faults ? 0 : UFFD_USER_MODE_ONLY);
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    int uffd = -1;
    if (device >= 0) {
        uffd = ioctl(device, USERFAULTFD_IOC_NEW, flags);
        close(device);
    }
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, flags);
    floor_expect(uffd >= 0, "userfaultfd (neither /dev/userfaultfd nor the system call)");
    return uffd;
}

void floor_guest_create(const struct floor_world *world, struct floor_memory *memory)
{
    memory->pages = world->pages;
    memory->page_bytes = world->page_bytes;
    uint64_t size_bytes = (memory->pages + (world->page_bytes == PAGE_BYTES)) * world->page_bytes;
    memory->memfd = create_memfd(world, size_bytes, &memory->mapping);
    memory->guest_address = (uint64_t)memory->mapping;
    memory->uffd = create_uffd(world->source_memory != NULL);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS};
    floor_expect(ioctl(memory->uffd, UFFDIO_API, &api) == 0, "UFFDIO_API with MINOR_SHMEM and MINOR_HUGETLBFS");
    struct uffdio_register range = {.range = {memory->guest_address, size_bytes},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR};
    floor_expect(ioctl(memory->uffd, UFFDIO_REGISTER, &range) == 0, "UFFDIO_REGISTER");

    int descriptors[2] = {memory->memfd, memory->uffd};
    union {
        char bytes[CMSG_SPACE(sizeof descriptors)];
        struct cmsghdr aligned;
    } control = {0};
    struct iovec body = {&memory->guest_address, sizeof memory->guest_address};
    struct msghdr message = {
        .msg_iov = &body, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof descriptors);
    memcpy(CMSG_DATA(header), descriptors, sizeof descriptors);
    floor_expect(sendmsg(world->guest_end[0], &message, 0) == (ssize_t)body.iov_len, "pass descriptors");
}

void floor_guest_adopt(const struct floor_world *world, struct floor_memory *memory)
{
    int descriptors[2];
    union {
        char bytes[CMSG_SPACE(sizeof descriptors)];
        struct cmsghdr aligned;
    } control;
    struct iovec body = {&memory->guest_address, sizeof memory->guest_address};
    struct msghdr message = {
        .msg_iov = &body, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof control.bytes};
    floor_expect(recvmsg(world->daemon_end[0], &message, MSG_CMSG_CLOEXEC) == (ssize_t)body.iov_len, "recvmsg");
    const struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    floor_check(header != NULL && header->cmsg_len == CMSG_LEN(sizeof descriptors), "the message with descriptors");
    memcpy(descriptors, CMSG_DATA(header), sizeof descriptors);
    memory->memfd = descriptors[0];
    memory->uffd = descriptors[1];
    memory->pages = world->pages;
    memory->page_bytes = world->page_bytes;
    memory->mapping = NULL;
}

unsigned char *floor_source_memory(const struct floor_world *world)
{
    unsigned char *mapping;
    create_memfd(world, world->pages * world->page_bytes, &mapping);
    for (uint64_t page = 0; page < world->pages; page++) {
        uint64_t *words = (uint64_t *)(mapping + page * world->page_bytes);
        uint64_t first = floor_page_word(world, page);
        for (size_t i = 0; i < world->page_bytes / sizeof *words; i++)
            words[i] = first == 0 ? 0 : first + i;
    }
    return mapping;
}

void floor_let_warm_memory_go(const struct floor_world *world)
{
    floor_expect(madvise(world->pool, world->options.memory_bytes, MADV_REMOVE) == 0, "let warm memory go");
}

void floor_place(const struct floor_memory *memory, uint64_t page, const void *bytes, size_t size_bytes)
{
    for (size_t done = 0; done < size_bytes;) {
        ssize_t written = pwrite(memory->memfd, (const char *)bytes + done, size_bytes - done, (off_t)(page * PAGE_BYTES + done));
        floor_expect(written > 0, "pwrite");
        done += (size_t)written;
    }
}

/* A page that somebody else has mapped already (EEXIST) is woken and stepped over: CONTINUE wakes only what it maps. */
void floor_continue(const struct floor_memory *memory, uint64_t page, uint64_t count)
{
    uint64_t at = memory->guest_address + page * memory->page_bytes, end = at + count * memory->page_bytes;
    while (at < end) {
        struct uffdio_continue request = {.range = {at, end - at}};
        if (ioctl(memory->uffd, UFFDIO_CONTINUE, &request) == 0)
            return;
        if (request.mapped > 0) {
            at += (uint64_t)request.mapped;
        } else if (errno == EEXIST) {
            struct uffdio_range one = {at, memory->page_bytes};
            floor_expect(ioctl(memory->uffd, UFFDIO_WAKE, &one) == 0, "UFFDIO_WAKE");
            at += memory->page_bytes;
        } else {
            floor_expect(errno == EAGAIN, "UFFDIO_CONTINUE");
        }
    }
}

uint64_t floor_read_fault(const struct floor_memory *memory)
{
    struct uffd_msg event;
    floor_expect(read(memory->uffd, &event, sizeof event) == sizeof event, "read the userfaultfd");
    floor_check(event.event == UFFD_EVENT_PAGEFAULT, "the kind of a userfaultfd event");
    return (event.arg.pagefault.address - memory->guest_address) / memory->page_bytes;
}

void floor_release_end_page(const struct floor_memory *memory)
{
    struct uffdio_zeropage request = {.range = {memory->guest_address + memory->pages * PAGE_BYTES, PAGE_BYTES}};
    floor_expect(ioctl(memory->uffd, UFFDIO_ZEROPAGE, &request) == 0, "UFFDIO_ZEROPAGE");
}
