/* Constants of the running kernel that installed headers may lack (Debian 12's end at 6.1), defined once, here.
 * Source: include/uapi/linux/userfaultfd.h and magic.h of Linux 6.18. */
#ifndef POSTCOPY_KERNEL_H
#define POSTCOPY_KERNEL_H

#include <linux/ioctl.h>
#include <linux/magic.h>
#include <linux/userfaultfd.h>

#ifndef USERFAULTFD_IOC_NEW /* 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#ifndef UFFD_USER_MODE_ONLY /* 5.11 */
#define UFFD_USER_MODE_ONLY 1
#endif

_Static_assert(UFFD_FEATURE_MINOR_HUGETLBFS == 1 << 9, "minor faults for hugetlbfs");
_Static_assert(UFFD_FEATURE_MINOR_SHMEM == 1 << 10, "minor faults for shmem");
_Static_assert(sizeof(struct uffd_msg) == 32, "read(2) of a userfaultfd gives whole 32-byte messages");

#endif
