/* The calls of a userfaultfd as plain functions: 0 or an errno. __init__.py is their typed face. */
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
/* UFFDIO_API, once per descriptor. features: what is asked for, then what the kernel has. */
int uffd_api(int fd, uint64_t *features);
/* UFFDIO_REGISTER; ioctls: bit mask of what the range allows. */
int uffd_register(int fd, uint64_t address, uint64_t size_bytes, uint64_t modes, uint64_t *ioctls);

#endif
