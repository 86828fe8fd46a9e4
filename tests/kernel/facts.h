/* What the kernel facts share: a file with a guest mapping and an alias, a userfaultfd over it, and a thread that touches a page.
 *
 * A thread that waits in a page fault is told from one that was woken by its state in /proc, which the waker changes before its
 * ioctl returns: so "it was not woken" is read once and needs no waiting. */
#ifndef POSTCOPY_TESTS_FACTS_H
#define POSTCOPY_TESTS_FACTS_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "kernel.h"

#define LACKING 77 /* exit status: this machine has no such thing */
#define PAGES 8
#define SMALL_PAGE_BYTES 4096u
#define HUGE_PAGE_BYTES (2u << 20)
#define MISSING_AND_MINOR (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR)

#define EXPECT(condition)                                                                       \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: the kernel differs: %s\n", __FILE__, __LINE__, #condition); \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)
#define EXPECT_ERRNO(call, error)                                                                                         \
    do {                                                                                                                  \
        errno = 0;                                                                                                        \
        long returned = (long)(call);                                                                                     \
        if (returned != -1 || errno != (error)) {                                                                         \
            fprintf(stderr, "%s:%d: the kernel differs: %s gave %ld, errno %d (%s), not %s\n", __FILE__, __LINE__, #call, \
                    returned, errno, strerror(errno), #error);                                                            \
            exit(1);                                                                                                      \
        }                                                                                                                 \
    } while (0)

struct memory_under_test {
    size_t page_bytes;
    int file;
    char *guest; /* the registered mapping */
    char *alias; /* never registered */
    int userfaultfd;
};

int userfaultfd_open(int flags);
/* PAGES pages, nothing touched, nothing registered; hugetlb: exits LACKING without free huge pages. */
struct memory_under_test memory_begin(bool hugetlb);
int register_range(const struct memory_under_test *memory, uint64_t modes);
int unregister_range(const struct memory_under_test *memory);
/* UFFDIO_CONTINUE of pages [first, first + count): 0 or -1 with errno; *mapped_bytes as the kernel left it. */
int continue_pages(const struct memory_under_test *memory, size_t first, size_t count, uint64_t mode, int64_t *mapped_bytes);
int wake_page(const struct memory_under_test *memory, size_t page);
/* The next event, waited for; and whether there is none now. */
struct uffd_msg next_event(const struct memory_under_test *memory);
bool no_event(const struct memory_under_test *memory);

/* A thread that reads or writes the first byte of a page. */
struct touch {
    volatile char *address;
    bool writes;
    _Atomic int done;
    _Atomic int tid;
    char seen;
    pthread_t thread;
};
void touch_begin(struct touch *touch, const struct memory_under_test *memory, size_t page, bool writes);
/* After its event has been read: true while nobody has woken it. */
bool touch_waits(const struct touch *touch);
char touch_end(struct touch *touch);
/* touch_begin, read its event, return the event's flags. */
uint64_t touch_faults(struct touch *touch, const struct memory_under_test *memory, size_t page, bool writes);

typedef void fact_function(void);
struct named_fact {
    const char *name;
    fact_function *holds;
};
extern const struct named_fact facts_of_registering[], facts_of_resolving[];

#endif
