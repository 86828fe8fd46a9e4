/* QEMU's mmap(), interposed: apart from the rest of the object, so that this can be linked into a program that is not QEMU (tests/fuzz). */
#include "preload.h"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The system call itself: the C library's mmap adds nothing to it on the machines where userfaultfd has minor faults. Both names
 * by label, since the header makes them one where offsets have 64 bits. */
__attribute__((visibility("default"))) void *preload_mmap(void *, size_t, int, int, int, off_t) __asm__("mmap64");
extern __typeof(preload_mmap) preload_mmap_too __asm__("mmap") __attribute__((alias("mmap64"), visibility("default")));

void *preload_mmap(void *address, size_t size_bytes, int protection, int flags, int fd, off_t offset_bytes)
{
    void *mapped = (void *)syscall(SYS_mmap, address, size_bytes, protection, flags, fd, offset_bytes);
    if (mapped != MAP_FAILED)
        preload_mapped(mapped, size_bytes, fd, offset_bytes);
    return mapped;
}
