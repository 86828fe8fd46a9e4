/* See schedule.h.
 *
 * The fair scheduler (EEVDF, Linux 6.6) lets a running thread finish its slice, 3 ms here, unless the one that wakes has
 * an earlier deadline. A thread may ask for a short slice (sched_setattr's sched_runtime, 6.12, 0.1 to 100 ms, no
 * privilege): the same share of the CPU in smaller pieces, and it preempts those with longer ones. Without it a fault
 * whose thread wakes beside two busy bulk threads and a busy guest waits milliseconds at times. */
#include "schedule.h"

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define URGENT_SLICE_NS 100000u /* the least that may be asked for */
#define SOON_SLICE_NS 500000u

/* struct sched_attr, first version: glibc declares it from 2.41 on only. Source: include/uapi/linux/sched/types.h. */
struct scheduling {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns;
    uint64_t deadline_ns;
    uint64_t period_ns;
};

static void set(uint32_t policy, uint64_t slice_ns)
{
    struct scheduling wanted = {.size = sizeof(wanted), .policy = policy, .runtime_ns = slice_ns};
    wanted.nice = getpriority(PRIO_PROCESS, 0);
    syscall(SYS_sched_setattr, 0, &wanted, 0);
}

void thread_named(const char *name)
{
    pthread_setname_np(pthread_self(), name);
}

void schedule_urgent(void)
{
    set(SCHED_OTHER, URGENT_SLICE_NS);
}

void schedule_soon(void)
{
    set(SCHED_OTHER, SOON_SLICE_NS);
}

void schedule_normal(void)
{
    set(SCHED_OTHER, 0);
}

void schedule_bulk(void)
{
    set(SCHED_BATCH, 0);
}
