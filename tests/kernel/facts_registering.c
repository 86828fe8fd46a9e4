/* What registering does, and what memory files refuse. */
#include <sys/uio.h>
#include <sys/wait.h>

#include "facts.h"

static void minor_only_reads_zeroes_from_a_hole(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(register_range(&memory, UFFDIO_REGISTER_MODE_MINOR) == 0);
    struct touch touch;
    touch_begin(&touch, &memory, 0, false);
    EXPECT(touch_end(&touch) == 0); /* it came through by itself */
    EXPECT(no_event(&memory));
}

static void missing_and_minor_tell_all_four_flags(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
    memory.alias[2 * memory.page_bytes] = memory.alias[3 * memory.page_bytes] = 'a';
    const uint64_t flags[4] = {0, UFFD_PAGEFAULT_FLAG_WRITE, UFFD_PAGEFAULT_FLAG_MINOR,
                               UFFD_PAGEFAULT_FLAG_MINOR | UFFD_PAGEFAULT_FLAG_WRITE};
    for (size_t page = 0; page < 4; page++) {
        struct touch touch;
        EXPECT(touch_faults(&touch, &memory, page, page % 2 == 1) == flags[page]);
        memory.alias[page * memory.page_bytes] = 'a'; /* now there is a page to continue */
        EXPECT(continue_pages(&memory, page, 1, 0, NULL) == 0);
        EXPECT(touch_end(&touch) == (page % 2 ? 'g' : 'a'));
    }
    EXPECT(UFFD_PAGEFAULT_FLAG_WRITE == 0x1 && UFFD_PAGEFAULT_FLAG_MINOR == 0x4);
}

static void torn_page_faults_as_minor(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
    EXPECT(pwrite(memory.file, "x", 1, 100) == 1); /* one byte of the page has arrived: the kernel already calls it minor */
    struct touch touch;
    EXPECT(touch_faults(&touch, &memory, 0, false) == UFFD_PAGEFAULT_FLAG_MINOR);
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    touch_end(&touch);
}

static void minor_of_anonymous_memory_is_einval(void)
{
    struct memory_under_test memory = memory_begin(false);
    memory.guest = mmap(NULL, PAGES * memory.page_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    EXPECT(memory.guest != MAP_FAILED);
    EXPECT_ERRNO(register_range(&memory, MISSING_AND_MINOR), EINVAL);
}

static void registering_without_api_is_einval(void)
{
    struct memory_under_test memory = memory_begin(false);
    close(memory.userfaultfd);
    memory.userfaultfd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    EXPECT(memory.userfaultfd >= 0);
    EXPECT_ERRNO(register_range(&memory, MISSING_AND_MINOR), EINVAL);
}

static void second_userfaultfd_is_ebusy(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
    memory.userfaultfd = userfaultfd_open(0);
    EXPECT_ERRNO(register_range(&memory, MISSING_AND_MINOR), EBUSY);
}

static void registering_a_subset_keeps_both_modes(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
    EXPECT(register_range(&memory, UFFDIO_REGISTER_MODE_MINOR) == 0);
    struct touch touch;
    EXPECT(touch_faults(&touch, &memory, 0, false) == 0);
    memory.alias[0] = 'a';
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    EXPECT(touch_end(&touch) == 'a');
}

static void registering_other_modes_replaces(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
    EXPECT(register_range(&memory, UFFDIO_REGISTER_MODE_WP) == 0); /* not contained in the old ones: they are gone */
    struct touch touch;
    touch_begin(&touch, &memory, 0, false);
    EXPECT(touch_end(&touch) == 0);
    EXPECT(no_event(&memory));
}

static void registering_both_puts_minor_only_right(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(register_range(&memory, UFFDIO_REGISTER_MODE_MINOR) == 0);
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0); /* as a daemon does when a guest attaches */
    struct touch touch;
    EXPECT(touch_faults(&touch, &memory, 0, false) == 0);
    memory.alias[0] = 'a';
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    EXPECT(touch_end(&touch) == 'a');
}

static void page_mapped_before_never_faults(void)
{
    struct memory_under_test memory = memory_begin(false);
    memory.guest[0] = 'b';
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
    struct touch touch;
    touch_begin(&touch, &memory, 0, false);
    EXPECT(touch_end(&touch) == 'b');
    EXPECT(no_event(&memory));
}

static void blocking_userfaultfd_polls_as_error(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(fcntl(memory.userfaultfd, F_SETFL, 0) == 0);
    struct pollfd polled = {.fd = memory.userfaultfd, .events = POLLIN};
    EXPECT(poll(&polled, 1, 0) == 1 && polled.revents == POLLERR);
}

/* In a child, as nobody and without a capability: a user-mode userfaultfd is enough for memory that only user code touches. */
static void user_mode_only_needs_no_privilege(void)
{
    pid_t child = fork();
    EXPECT(child >= 0);
    if (child == 0) {
        alarm(10);
        if (getuid() == 0)
            EXPECT(setgid(65534) == 0 && setuid(65534) == 0);
        struct memory_under_test memory = memory_begin(false);
        memory.userfaultfd = userfaultfd_open(UFFD_USER_MODE_ONLY);
        EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
        EXPECT_ERRNO(read(open("/dev/zero", O_RDONLY), memory.guest, 8), EFAULT); /* a fault taken inside the kernel */
        EXPECT(no_event(&memory));
        memory.alias[0] = 'a';
        struct touch touch;
        EXPECT(touch_faults(&touch, &memory, 0, false) == UFFD_PAGEFAULT_FLAG_MINOR);
        EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
        EXPECT(touch_end(&touch) == 'a');
        _exit(0);
    }
    int status;
    EXPECT(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static void sealed_file_does_not_shrink(void)
{
    struct memory_under_test memory = memory_begin(false);
    EXPECT(fcntl(memory.file, F_ADD_SEALS, F_SEAL_SHRINK) == 0); /* while it is mapped, twice */
    EXPECT_ERRNO(ftruncate(memory.file, (off_t)memory.page_bytes), EPERM);
    EXPECT(fallocate(memory.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, (off_t)memory.page_bytes) == 0);
}

static void pwrite_of_hugetlb_is_einval(void)
{
    struct memory_under_test memory = memory_begin(true);
    EXPECT_ERRNO(pwrite(memory.file, "x", 1, 0), EINVAL);
    char byte;
    EXPECT(pread(memory.file, &byte, 1, 0) == 1 && byte == 0); /* reading is allowed, a hole reads as zeroes */
}

static long meminfo(const char *name)
{
    char line[128];
    long value = -1;
    FILE *file = fopen("/proc/meminfo", "re");
    EXPECT(file);
    while (fgets(line, sizeof(line), file))
        if (strncmp(line, name, strlen(name)) == 0)
            value = atol(line + strlen(name) + 1);
    fclose(file);
    return value;
}

/* The pool may hold pages now: take them all, the next one is what the fact is about. */
static void writev_without_a_huge_page_is_efault(void)
{
    int file = memfd_create("facts", MFD_CLOEXEC | MFD_HUGETLB);
    if (file < 0)
        exit(LACKING);
    long pages = meminfo("HugePages_Total:") + meminfo("HugePages_Surp:") + 1;
    size_t size_bytes = (size_t)pages * HUGE_PAGE_BYTES;
    EXPECT(ftruncate(file, (off_t)size_bytes) == 0);
    char *memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    EXPECT(memory != MAP_FAILED);
    for (long page = 0; page < pages; page++) {
        char byte = 'x';
        struct iovec from = {&byte, 1}, to = {memory + (size_t)page * HUGE_PAGE_BYTES, 1};
        if (process_vm_writev(getpid(), &from, 1, &to, 1, 0) != 1) {
            EXPECT(errno == EFAULT);
            return;
        }
    }
    EXPECT(!"one page more than there are was written");
}

const struct named_fact facts_of_registering[] = {
    {"minor-only-reads-zeroes-from-a-hole", minor_only_reads_zeroes_from_a_hole},
    {"missing-and-minor-tell-all-four-flags", missing_and_minor_tell_all_four_flags},
    {"torn-page-faults-as-minor", torn_page_faults_as_minor},
    {"minor-of-anonymous-memory-is-einval", minor_of_anonymous_memory_is_einval},
    {"registering-without-api-is-einval", registering_without_api_is_einval},
    {"second-userfaultfd-is-ebusy", second_userfaultfd_is_ebusy},
    {"registering-a-subset-keeps-both-modes", registering_a_subset_keeps_both_modes},
    {"registering-other-modes-replaces", registering_other_modes_replaces},
    {"registering-both-puts-minor-only-right", registering_both_puts_minor_only_right},
    {"page-mapped-before-never-faults", page_mapped_before_never_faults},
    {"blocking-userfaultfd-polls-as-error", blocking_userfaultfd_polls_as_error},
    {"user-mode-only-needs-no-privilege", user_mode_only_needs_no_privilege},
    {"sealed-file-does-not-shrink", sealed_file_does_not_shrink},
    {"pwrite-of-hugetlb-is-einval", pwrite_of_hugetlb_is_einval},
    {"writev-without-a-huge-page-is-efault", writev_without_a_huge_page_is_efault},
    {NULL, NULL},
};
