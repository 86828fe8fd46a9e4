/* What the fill ioctls, waking and letting go do. */
#include <sys/socket.h>
#include <sys/wait.h>

#include "facts.h"

static struct memory_under_test registered(bool hugetlb)
{
    struct memory_under_test memory = memory_begin(hugetlb);
    EXPECT(register_range(&memory, MISSING_AND_MINOR) == 0);
    return memory;
}

static void continue_of_a_hole_is_efault(void)
{
    struct memory_under_test memory = registered(false);
    EXPECT_ERRNO(continue_pages(&memory, 0, 1, 0, NULL), EFAULT);
}

static void continue_of_a_mapped_page_is_eexist_and_wakes_nobody(void)
{
    struct memory_under_test memory = registered(false);
    struct touch touch;
    touch_faults(&touch, &memory, 0, false);
    memory.alias[0] = 'a';
    EXPECT(continue_pages(&memory, 0, 1, UFFDIO_CONTINUE_MODE_DONTWAKE, NULL) == 0);
    EXPECT(touch_waits(&touch));
    EXPECT_ERRNO(continue_pages(&memory, 0, 1, 0, NULL), EEXIST);
    EXPECT(touch_waits(&touch));
    EXPECT(wake_page(&memory, 0) == 0);
    EXPECT(touch_end(&touch) == 'a');
}

static void range_that_ends_early_is_eagain_with_progress(void)
{
    struct memory_under_test memory = registered(false);
    int64_t mapped_bytes = 0;
    memory.alias[0] = memory.alias[memory.page_bytes] = 'a'; /* page 2 stays a hole */
    EXPECT_ERRNO(continue_pages(&memory, 0, 4, 0, &mapped_bytes), EAGAIN);
    EXPECT(mapped_bytes == 2 * (int64_t)memory.page_bytes);
    EXPECT_ERRNO(continue_pages(&memory, 2, 2, 0, &mapped_bytes), EFAULT);
    EXPECT(mapped_bytes == -EFAULT); /* the field is signed */
}

static void range_over_a_mapped_page_ends_before_it(void)
{
    struct memory_under_test memory = registered(false);
    int64_t mapped_bytes = 0;
    for (size_t page = 0; page < 3; page++)
        memory.alias[page * memory.page_bytes] = 'a';
    EXPECT(continue_pages(&memory, 1, 1, 0, NULL) == 0);
    EXPECT_ERRNO(continue_pages(&memory, 0, 3, 0, &mapped_bytes), EAGAIN);
    EXPECT(mapped_bytes == (int64_t)memory.page_bytes);
    EXPECT_ERRNO(continue_pages(&memory, 1, 2, 0, NULL), EEXIST);
}

static void writing_through_the_alias_wakes_nobody(void)
{
    struct memory_under_test memory = registered(false);
    struct touch touch;
    EXPECT(touch_faults(&touch, &memory, 0, false) == 0);
    memory.alias[0] = 'a';
    EXPECT(touch_waits(&touch) && no_event(&memory));
    EXPECT(wake_page(&memory, 0) == 0); /* it faults anew: a message that was read is not sent again, this is another one */
    EXPECT(next_event(&memory).arg.pagefault.flags == UFFD_PAGEFAULT_FLAG_MINOR);
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    EXPECT(touch_end(&touch) == 'a');
}

static void two_threads_give_two_messages_and_one_continue_wakes_both(void)
{
    struct memory_under_test memory = registered(false);
    struct touch first, second;
    touch_faults(&first, &memory, 0, false);
    touch_faults(&second, &memory, 0, false);
    memory.alias[0] = 'a';
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    EXPECT(touch_end(&first) == 'a' && touch_end(&second) == 'a');
    EXPECT(no_event(&memory));
}

static void allocated_page_continues_as_zeroes(void)
{
    struct memory_under_test memory = registered(false);
    EXPECT(fallocate(memory.file, 0, 0, (off_t)memory.page_bytes) == 0); /* never a substitute for data */
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    EXPECT(memory.guest[0] == 0);
}

static int zeropage(const struct memory_under_test *memory, size_t page)
{
    struct uffdio_zeropage request = {.range = {(uintptr_t)memory->guest + page * memory->page_bytes, memory->page_bytes}};
    return ioctl(memory->userfaultfd, UFFDIO_ZEROPAGE, &request);
}

static void zeropage_fills_a_hole(void)
{
    struct memory_under_test memory = registered(false);
    struct touch touch;
    touch_faults(&touch, &memory, 0, false);
    EXPECT(zeropage(&memory, 0) == 0);
    EXPECT(touch_end(&touch) == 0);
    EXPECT_ERRNO(zeropage(&memory, 0), EEXIST);
}

static void hugetlb_has_no_zeropage_but_fallocate(void)
{
    struct memory_under_test memory = registered(true);
    struct touch touch;
    EXPECT(touch_faults(&touch, &memory, 1, false) == 0);
    EXPECT_ERRNO(zeropage(&memory, 1), EINVAL);
    EXPECT_ERRNO(continue_pages(&memory, 1, 1, 0, NULL), EFAULT);
    EXPECT(fallocate(memory.file, 0, (off_t)memory.page_bytes, (off_t)memory.page_bytes) == 0);
    EXPECT(continue_pages(&memory, 1, 1, 0, NULL) == 0);
    EXPECT(touch_end(&touch) == 0);
}

static void unregistering_wakes_and_reads_zeroes(void)
{
    struct memory_under_test memory = registered(false);
    struct touch touch;
    touch_faults(&touch, &memory, 0, false);
    EXPECT(unregister_range(&memory) == 0);
    EXPECT(touch_end(&touch) == 0);
}

static void closing_the_last_descriptor_reads_zeroes(void)
{
    struct memory_under_test memory = registered(false);
    struct touch touch;
    touch_faults(&touch, &memory, 0, false);
    close(memory.userfaultfd);
    EXPECT(touch_end(&touch) == 0);
}

static void duplicate_keeps_threads_waiting(void)
{
    struct memory_under_test memory = registered(false);
    struct touch touch;
    touch_faults(&touch, &memory, 0, false);
    int duplicate = fcntl(memory.userfaultfd, F_DUPFD_CLOEXEC, 0);
    close(memory.userfaultfd);
    memory.userfaultfd = duplicate;
    EXPECT(touch_waits(&touch));
    memory.alias[0] = 'a';
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    EXPECT(touch_end(&touch) == 'a');
}

static void late_copy_over_a_mapped_page_destroys_a_write(void)
{
    struct memory_under_test memory = registered(false);
    struct touch touch;
    touch_faults(&touch, &memory, 0, true);
    memory.alias[0] = 'a';
    EXPECT(continue_pages(&memory, 0, 1, 0, NULL) == 0);
    EXPECT(touch_end(&touch) == 'g');
    memory.alias[0] = 'a'; /* nothing refuses it: why a page is written by one owner, once */
    EXPECT(memory.guest[0] == 'a');
}

/* The guest's process makes memory and userfaultfd, passes the descriptor, and ends or unmaps. */
static struct memory_under_test of_a_guest(bool unmaps, pid_t *guest, int *guest_socket)
{
    int sockets[2];
    EXPECT(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, sockets) == 0);
    union {
        char bytes[CMSG_SPACE(sizeof(int))];
        struct cmsghdr alignment;
    } control = {{0}};
    struct memory_under_test memory;
    struct iovec piece = {&memory, sizeof(memory)};
    struct msghdr message = {.msg_iov = &piece, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};
    *guest = fork();
    EXPECT(*guest >= 0);
    if (*guest == 0) {
        alarm(10);
        close(sockets[0]);
        memory = registered(false);
        if (unmaps)
            EXPECT(munmap(memory.guest, PAGES * memory.page_bytes) == 0);
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        *header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(header), &memory.userfaultfd, sizeof(int));
        EXPECT(sendmsg(sockets[1], &message, 0) == sizeof(memory));
        EXPECT(shutdown(sockets[1], SHUT_WR) == 0);
        char byte;
        _exit(read(sockets[1], &byte, 1) == 0 ? 0 : 1); /* until the parent closes its end */
    }
    close(sockets[1]);
    EXPECT(recvmsg(sockets[0], &message, MSG_CMSG_CLOEXEC) == sizeof(memory));
    memcpy(&memory.userfaultfd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(int));
    *guest_socket = sockets[0];
    return memory;
}

static void continue_after_the_guest_ended_is_esrch(void)
{
    pid_t guest;
    int guest_socket, status;
    struct memory_under_test memory = of_a_guest(false, &guest, &guest_socket);
    close(guest_socket);
    EXPECT(waitpid(guest, &status, 0) == guest && status == 0);
    EXPECT_ERRNO(continue_pages(&memory, 0, 1, 0, NULL), ESRCH);
}

static void continue_of_an_unmapped_range_is_enoent(void)
{
    pid_t guest;
    int guest_socket, status;
    struct memory_under_test memory = of_a_guest(true, &guest, &guest_socket);
    EXPECT_ERRNO(continue_pages(&memory, 0, 1, 0, NULL), ENOENT);
    close(guest_socket);
    EXPECT(waitpid(guest, &status, 0) == guest && status == 0);
}

const struct named_fact facts_of_resolving[] = {
    {"continue-of-a-hole-is-efault", continue_of_a_hole_is_efault},
    {"continue-of-a-mapped-page-is-eexist-and-wakes-nobody", continue_of_a_mapped_page_is_eexist_and_wakes_nobody},
    {"range-that-ends-early-is-eagain-with-progress", range_that_ends_early_is_eagain_with_progress},
    {"range-over-a-mapped-page-ends-before-it", range_over_a_mapped_page_ends_before_it},
    {"writing-through-the-alias-wakes-nobody", writing_through_the_alias_wakes_nobody},
    {"two-threads-give-two-messages-and-one-continue-wakes-both", two_threads_give_two_messages_and_one_continue_wakes_both},
    {"allocated-page-continues-as-zeroes", allocated_page_continues_as_zeroes},
    {"zeropage-fills-a-hole", zeropage_fills_a_hole},
    {"hugetlb-has-no-zeropage-but-fallocate", hugetlb_has_no_zeropage_but_fallocate},
    {"unregistering-wakes-and-reads-zeroes", unregistering_wakes_and_reads_zeroes},
    {"closing-the-last-descriptor-reads-zeroes", closing_the_last_descriptor_reads_zeroes},
    {"duplicate-keeps-threads-waiting", duplicate_keeps_threads_waiting},
    {"late-copy-over-a-mapped-page-destroys-a-write", late_copy_over_a_mapped_page_destroys_a_write},
    {"continue-after-the-guest-ended-is-esrch", continue_after_the_guest_ended_is_esrch},
    {"continue-of-an-unmapped-range-is-enoent", continue_of_an_unmapped_range_is_enoent},
    {NULL, NULL},
};
