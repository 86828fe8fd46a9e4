/* One thread touches, the other sleeps in poll() until there is an event; or, for the ways in place, the toucher's signal handler
 * does it all. What decides the figure is where the two threads run: waking one on an idle CPU costs ten times what the rest does
 * (in a virtual machine above all), and the scheduler puts them together in one run and apart in the next. So each way is
 * measured as the scheduler likes, with both threads on one CPU, and with each on a CPU of its own: the first two that this
 * process may use. Nothing spins. The handler checks that each event is the one that its way is about. */
#include "floor.h"
#include "resolvers.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include "../uffd/kernel.h"

#define SIGNAL_STACK_BYTES (64u << 10)

struct toucher {
    const struct area *area;
    const uint32_t *order;
    struct histogram *latency;
    cpu_set_t cpus;
};

/* Of the toucher's signals; it is the only thread that has any. */
static const struct area *signalled_area;
static uint64_t signals;

static void on_sigbus(int number, siginfo_t *information, void *context)
{
    const struct area *area = signalled_area;
    uint64_t page = ((uint64_t)(uintptr_t)information->si_addr - (uint64_t)(uintptr_t)area->mapping) / area->page_bytes;
    (void)number, (void)context;
    floor_check(page < area->pages, "the address of a SIGBUS"); /* one of our own mistakes: it would come again for ever */
    area->way->resolve(area, page, 1);
    signals++;
}

/* On a stack of its own: the fault may be on the thread's stack, if that is guest memory too. */
static void *take_signals(const struct area *area)
{
    stack_t stack = {.ss_sp = floor_allocate(SIGNAL_STACK_BYTES), .ss_size = SIGNAL_STACK_BYTES};
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_ONSTACK};
    signalled_area = area;
    signals = 0;
    floor_expect(sigaltstack(&stack, NULL) == 0 && sigaction(SIGBUS, &action, NULL) == 0, "signal handler");
    return stack.ss_sp;
}

static void give_signals_back(void *stack)
{
    struct sigaction action = {.sa_handler = SIG_DFL};
    stack_t none = {.ss_flags = SS_DISABLE};
    floor_check(signals == signalled_area->pages, "the number of signals");
    floor_expect(sigaction(SIGBUS, &action, NULL) == 0 && sigaltstack(&none, NULL) == 0, "signal handler");
    free(stack);
}

static void *touch_thread(void *argument)
{
    const struct toucher *self = argument;
    const struct area *area = self->area;
    floor_expect(sched_setaffinity(0, sizeof self->cpus, &self->cpus) == 0, "sched_setaffinity");
    void *stack = area->way->in_place ? take_signals(area) : NULL;
    for (uint64_t touch = 0; touch < area->pages; touch++) {
        const volatile uint64_t *word = (const volatile uint64_t *)(area->mapping + self->order[touch] * area->page_bytes);
        uint64_t began_ns = clock_monotonic_ns();
        uint64_t value = *word;
        uint64_t took_ns = clock_monotonic_ns() - began_ns;
        histogram_record(self->latency, took_ns);
        floor_check(value == area_first_word(area, self->order[touch]), "the content of a touched page");
    }
    if (stack != NULL)
        give_signals_back(stack);
    return NULL;
}

/* One toucher, one event for each page. */
static void answer_faults(const struct area *area)
{
    struct pollfd polled = {.fd = area->userfaultfd, .events = POLLIN};
    struct uffd_msg event;
    for (uint64_t answered = 0; answered < area->pages; answered++) {
        floor_expect(poll(&polled, 1, -1) == 1 && read(area->userfaultfd, &event, sizeof event) == sizeof event, "read a fault");
        floor_check(event.event == UFFD_EVENT_PAGEFAULT && event.arg.pagefault.flags == area->way->fault_flags, "the kind of a fault");
        area->way->resolve(area, (event.arg.pagefault.address - (uint64_t)(uintptr_t)area->mapping) / area->page_bytes, 1);
    }
}

static uint32_t *shuffled(const struct area *area)
{
    uint32_t *order = floor_allocate(area->pages * sizeof *order);
    uint64_t random = area->seed;
    for (uint64_t i = 0; i < area->pages; i++) {
        uint64_t other = floor_random(&random) % (i + 1);
        order[i] = order[other];
        order[other] = (uint32_t)i;
    }
    return order;
}

/* The nth CPU of those that this process may use; false: there are fewer. */
static bool nth_cpu(const cpu_set_t *usable, int nth, cpu_set_t *chosen)
{
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, usable) || nth-- > 0)
            continue;
        CPU_ZERO(chosen);
        CPU_SET(cpu, chosen);
        return true;
    }
    return false;
}

static cpu_set_t usable_cpus(void)
{
    cpu_set_t usable;
    floor_expect(sched_getaffinity(0, sizeof usable, &usable) == 0, "sched_getaffinity");
    return usable;
}

bool placement_is_there(const struct way *way, enum placement placement)
{
    cpu_set_t usable = usable_cpus();
    return placement != TWO_CPUS || (!way->in_place && CPU_COUNT(&usable) >= 2);
}

void touch_all(struct area *area, enum placement placement, struct touches *touches)
{
    cpu_set_t usable = usable_cpus(), own = usable;
    uint32_t *order = shuffled(area);
    struct toucher toucher = {area, order, &touches->latency, usable};
    pthread_t thread;
    if (placement != UNPINNED)
        floor_check(nth_cpu(&usable, 0, &own) && nth_cpu(&usable, placement == TWO_CPUS, &toucher.cpus), "the number of CPUs");
    floor_expect(sched_setaffinity(0, sizeof own, &own) == 0, "sched_setaffinity");
    double before_seconds = floor_cpu_seconds();
    errno = pthread_create(&thread, NULL, touch_thread, &toucher);
    floor_expect(errno == 0, "pthread_create");
    if (!area->way->in_place)
        answer_faults(area);
    errno = pthread_join(thread, NULL);
    floor_expect(errno == 0, "pthread_join");
    touches->cpu_seconds += floor_cpu_seconds() - before_seconds;
    floor_expect(sched_setaffinity(0, sizeof usable, &usable) == 0, "sched_setaffinity");
    free(order);
}
