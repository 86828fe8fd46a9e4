/* The calls of a userfaultfd as plain functions: 0 or an errno, nothing decided. descriptor.py is their typed face.
 * Addresses and sizes are bytes, modes the kernel's own bits. All are one system call and may be called from any thread. */
#ifndef POSTCOPY_UFFD_H
#define POSTCOPY_UFFD_H

#include <stdint.h>

struct uffd_opened {
    int32_t fd;           /* -1: neither way worked */
    int32_t device_errno; /* of /dev/userfaultfd; 0 when it worked */
    int32_t syscall_errno;
};

/* Try /dev/userfaultfd, then the syscall; close-on-exec, non-blocking. user_mode_only: no faults taken inside the kernel. */
void uffd_open(int user_mode_only, struct uffd_opened *opened);
/* UFFDIO_API, once per descriptor. features: what is asked for, then what the kernel has; ioctls: what the descriptor allows. */
int uffd_api(int fd, uint64_t *features);
int uffd_api_and_ioctls(int fd, uint64_t *features, uint64_t *ioctls);
/* UFFDIO_REGISTER; ioctls: bit mask of what the range allows. */
int uffd_register(int fd, uint64_t address, uint64_t size_bytes, uint64_t modes, uint64_t *ioctls);
int uffd_unregister(int fd, uint64_t address, uint64_t size_bytes);
int uffd_wake(int fd, uint64_t address, uint64_t size_bytes);
int uffd_writeprotect(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode);

/* The fill ioctls. *field is the result field as the kernel left it: bytes done, or a negative errno; 0 where it wrote nothing. */
int uffd_copy(int fd, uint64_t to, uint64_t from, uint64_t size_bytes, uint64_t mode, int64_t *field);
int uffd_move(int fd, uint64_t to, uint64_t from, uint64_t size_bytes, uint64_t mode, int64_t *field);
int uffd_zeropage(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode, int64_t *field);
int uffd_continue(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode, int64_t *field);
int uffd_poison(int fd, uint64_t address, uint64_t size_bytes, uint64_t mode, int64_t *field);

#define UFFD_READ_MAX 64
/* One message, flat; what does not belong to its event is 0 (descriptor: -1). */
struct uffd_event {
    uint32_t event;      /* UFFD_EVENT_... */
    uint32_t thread_id;  /* page fault, with UFFD_FEATURE_THREAD_ID */
    int32_t descriptor;  /* fork: the child's userfaultfd, open in the reader */
    uint64_t flags;      /* page fault */
    uint64_t address;    /* page fault; remap: from; remove and unmap: start */
    uint64_t to;         /* remap */
    uint64_t end;        /* remove and unmap */
    uint64_t size_bytes; /* remap */
};
/* One read(2) of up to UFFD_READ_MAX messages; *count of them came. EAGAIN: none now. */
int uffd_read(int fd, struct uffd_event *events, uint64_t events_max, uint64_t *count);

struct pm_scan_arg;
/* PAGEMAP_SCAN on a /proc/PID/pagemap descriptor; argument->size is filled in; *regions_count of the vector were written. */
int pagemap_scan(int pagemap_fd, struct pm_scan_arg *argument, uint64_t *regions_count);

#endif
