/* confined COMMAND...: run it under what the unit's lines ask of seccomp(2), as systemd would translate them.
 *
 * allowed_calls.h and allowed_families.h come from the unit: numbers, each with a comma. The other rules are those of
 * systemd's src/shared/seccomp-util.c (252): MemoryDenyWriteExecute (mmap writable and executable, mprotect executable) and
 * RestrictNamespaces (unshare and setns, clone with a namespace's flag; clone3, whose flags a filter cannot see, is ENOSYS). */
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_MDWE /* Linux 6.3 */
#define PR_SET_MDWE 65
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif

#if defined(__x86_64__)
#define NATIVE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define NATIVE AUDIT_ARCH_AARCH64
#else
#error "add this machine's AUDIT_ARCH"
#endif

#define NAMESPACES (CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)

static const unsigned allowed_calls[] = {
#include "allowed_calls.h"
};
static const unsigned allowed_families[] = {
#include "allowed_families.h"
};
static struct sock_filter program[BPF_MAXINSNS];
static unsigned short length;

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static void add(unsigned short code, unsigned k, unsigned char if_true, unsigned char if_false)
{
    if (length == BPF_MAXINSNS)
        abort();
    program[length++] = (struct sock_filter){.code = code, .k = k, .jt = if_true, .jf = if_false};
}

static void load(size_t offset_bytes)
{
    add(BPF_LD | BPF_W | BPF_ABS, (unsigned)offset_bytes, 0, 0);
}

static void load_argument(unsigned index) /* its lower half, on a little-endian machine */
{
    load(offsetof(struct seccomp_data, args) + 8 * index);
}

static void answer(unsigned what)
{
    add(BPF_RET | BPF_K, what, 0, 0);
}

/* With the number of the call loaded: what follows, up to end_of_call, is for this one. */
static unsigned short start_of_call(unsigned number)
{
    add(BPF_JMP | BPF_JEQ | BPF_K, number, 0, 0);
    return (unsigned short)(length - 1);
}

static void end_of_call(unsigned short start)
{
    load(offsetof(struct seccomp_data, nr));
    program[start].jf = (unsigned char)(length - start - 1);
}

static void refuse_bits(unsigned number, unsigned argument, unsigned bits)
{
    unsigned short start = start_of_call(number);
    load_argument(argument);
    add(BPF_ALU | BPF_AND | BPF_K, bits, 0, 0);
    add(BPF_JMP | BPF_JEQ | BPF_K, bits, 0, 1);
    answer(SECCOMP_RET_ERRNO | EPERM);
    end_of_call(start);
}

static void refuse(unsigned number, unsigned error_number)
{
    unsigned short start = start_of_call(number);
    answer(SECCOMP_RET_ERRNO | error_number);
    end_of_call(start);
}

static void restrict_families(void)
{
    unsigned short start = start_of_call(SYS_socket);
    load_argument(0);
    for (size_t i = 0; i < COUNT(allowed_families); i++)
        add(BPF_JMP | BPF_JEQ | BPF_K, allowed_families[i], (unsigned char)(COUNT(allowed_families) - i), 0);
    answer(SECCOMP_RET_ERRNO | EAFNOSUPPORT);
    end_of_call(start);
}

static void restrict_namespaces(void)
{
    unsigned short start = start_of_call(SYS_clone);
    load_argument(0);
    add(BPF_JMP | BPF_JSET | BPF_K, NAMESPACES, 0, 1);
    answer(SECCOMP_RET_ERRNO | EPERM);
    end_of_call(start);
    refuse(SYS_clone3, ENOSYS);
    refuse(SYS_unshare, EPERM);
    refuse(SYS_setns, EPERM);
}

int main(int argc, char **argv)
{
    if (argc < 2)
        return 2;
    load(offsetof(struct seccomp_data, arch));
    add(BPF_JMP | BPF_JEQ | BPF_K, NATIVE, 1, 0);
    answer(SECCOMP_RET_KILL_PROCESS);
    load(offsetof(struct seccomp_data, nr));
    restrict_families();
    restrict_namespaces();
    refuse_bits(SYS_mmap, 2, PROT_WRITE | PROT_EXEC);
    refuse_bits(SYS_mprotect, 2, PROT_EXEC);
    for (size_t i = 0; i < COUNT(allowed_calls); i++) {
        add(BPF_JMP | BPF_JEQ | BPF_K, allowed_calls[i], 0, 1);
        answer(SECCOMP_RET_ALLOW);
    }
    answer(SECCOMP_RET_ERRNO | EPERM);

    struct sock_fprog filter = {.len = length, .filter = program};
    if (prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) != 0 && errno != EINVAL) {
        perror("PR_SET_MDWE");
        return 1;
    }
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter) != 0) {
        perror("seccomp");
        return 1;
    }
    execv(argv[1], argv + 1);
    perror(argv[1]);
    return 1;
}
