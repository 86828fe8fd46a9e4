/* facts NAME: exit 0 when the running kernel does what the code relies on, 1 naming what differs, 77 where it lacks something.
 * One fact a process: whatever touches registered memory can hang, and a process can be killed. */
#include "facts.h"

int userfaultfd_open(int flags)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | flags);
    if (fd < 0 && flags == 0) /* without privilege this is what there is */
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    EXPECT(fd >= 0);
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS};
    EXPECT(ioctl(fd, UFFDIO_API, &api) == 0);
    return fd;
}

struct memory_under_test memory_begin(bool hugetlb)
{
    struct memory_under_test memory = {.page_bytes = hugetlb ? HUGE_PAGE_BYTES : SMALL_PAGE_BYTES};
    memory.file = memfd_create("facts", MFD_CLOEXEC | MFD_ALLOW_SEALING | (hugetlb ? MFD_HUGETLB : 0));
    if (memory.file < 0 && hugetlb)
        exit(LACKING);
    size_t size_bytes = PAGES * memory.page_bytes;
    EXPECT(memory.file >= 0 && ftruncate(memory.file, (off_t)size_bytes) == 0);
    memory.guest = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.file, 0);
    if (memory.guest == MAP_FAILED && hugetlb)
        exit(LACKING);
    memory.alias = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, memory.file, 0);
    EXPECT(memory.guest != MAP_FAILED && memory.alias != MAP_FAILED);
    memory.userfaultfd = userfaultfd_open(0);
    return memory;
}

int register_range(const struct memory_under_test *memory, uint64_t modes)
{
    struct uffdio_register request = {.range = {(uintptr_t)memory->guest, PAGES * memory->page_bytes}, .mode = modes};
    return ioctl(memory->userfaultfd, UFFDIO_REGISTER, &request);
}

int unregister_range(const struct memory_under_test *memory)
{
    struct uffdio_range range = {(uintptr_t)memory->guest, PAGES * memory->page_bytes};
    return ioctl(memory->userfaultfd, UFFDIO_UNREGISTER, &range);
}

int continue_pages(const struct memory_under_test *memory, size_t first, size_t count, uint64_t mode, int64_t *mapped_bytes)
{
    struct uffdio_continue request = {
        .range = {(uintptr_t)memory->guest + first * memory->page_bytes, count * memory->page_bytes}, .mode = mode};
    int returned = ioctl(memory->userfaultfd, UFFDIO_CONTINUE, &request);
    if (mapped_bytes)
        *mapped_bytes = request.mapped;
    return returned;
}

int wake_page(const struct memory_under_test *memory, size_t page)
{
    struct uffdio_range range = {(uintptr_t)memory->guest + page * memory->page_bytes, memory->page_bytes};
    return ioctl(memory->userfaultfd, UFFDIO_WAKE, &range);
}

struct uffd_msg next_event(const struct memory_under_test *memory)
{
    struct pollfd polled = {.fd = memory->userfaultfd, .events = POLLIN};
    struct uffd_msg message;
    EXPECT(poll(&polled, 1, -1) == 1 && polled.revents == POLLIN);
    EXPECT(read(memory->userfaultfd, &message, sizeof(message)) == sizeof(message));
    return message;
}

bool no_event(const struct memory_under_test *memory)
{
    struct uffd_msg message;
    return read(memory->userfaultfd, &message, sizeof(message)) < 0 && errno == EAGAIN;
}

static void *touch_main(void *of)
{
    struct touch *touch = of;
    atomic_store(&touch->tid, (int)syscall(SYS_gettid));
    if (touch->writes)
        *touch->address = 'g';
    touch->seen = *touch->address;
    atomic_store(&touch->done, 1);
    return NULL;
}

void touch_begin(struct touch *touch, const struct memory_under_test *memory, size_t page, bool writes)
{
    *touch = (struct touch){.address = memory->guest + page * memory->page_bytes, .writes = writes};
    EXPECT(pthread_create(&touch->thread, NULL, touch_main, touch) == 0);
}

bool touch_waits(const struct touch *touch)
{
    char path[64], line[256] = "";
    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", atomic_load(&touch->tid));
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t size_bytes = fd < 0 ? 0 : read(fd, line, sizeof(line) - 1);
    close(fd);
    const char *state = size_bytes > 0 ? strrchr(line, ')') : NULL;
    return state && (state[2] == 'S' || state[2] == 'D') && !atomic_load(&touch->done);
}

char touch_end(struct touch *touch)
{
    EXPECT(pthread_join(touch->thread, NULL) == 0);
    return touch->seen;
}

uint64_t touch_faults(struct touch *touch, const struct memory_under_test *memory, size_t page, bool writes)
{
    touch_begin(touch, memory, page, writes);
    struct uffd_msg message = next_event(memory);
    EXPECT(message.event == UFFD_EVENT_PAGEFAULT);
    EXPECT((message.arg.pagefault.address & ~(uint64_t)(memory->page_bytes - 1)) == (uintptr_t)touch->address);
    return message.arg.pagefault.flags;
}

int main(int argc, char **argv)
{
    alarm(15);
    const struct named_fact *tables[] = {facts_of_registering, facts_of_resolving};
    for (size_t table = 0; argc == 2 && table < sizeof(tables) / sizeof(tables[0]); table++)
        for (const struct named_fact *fact = tables[table]; fact->name; fact++)
            if (strcmp(argv[1], fact->name) == 0) {
                fact->holds();
                return 0;
            }
    fprintf(stderr, "usage: facts NAME\n");
    return 2;
}
