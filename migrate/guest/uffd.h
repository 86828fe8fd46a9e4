/* The userfaultfd calls that a guest makes for itself, as plain functions: 0 or an errno. uffd.py is their typed face. */
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

/* Address space for several regions side by side, aligned to 2 MiB; and one region of it. NULL/errno on failure. */
void *mapping_reserve(uint64_t size_bytes);
int mapping_place(void *address, uint64_t size_bytes, int memory_fd, uint64_t offset_bytes);
int mapping_release(void *address, uint64_t size_bytes);

#endif
