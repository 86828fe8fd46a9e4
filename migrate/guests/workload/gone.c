/* See gone.h. SIGBUS goes to the thread that touched; the handler leaves the touch by siglongjmp, which is safe here: a worker that touches
 * guest memory holds no lock and is in no function of libc. Any other SIGBUS of the process ends it as ever. */
#include "gone.h"

#include <signal.h>

static _Thread_local struct worker *toucher;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
    (void)context;
    struct worker *worker = toucher;
    uintptr_t address = (uintptr_t)info->si_addr, memory = worker ? (uintptr_t)worker->workload->memory : 0;
    if (!worker || address < memory || address - memory >= worker->workload->memory_blocks * WORKLOAD_BLOCK_BYTES) {
        signal(number, SIG_DFL); /* the touch comes again */
        return;
    }
    worker->gone_block = (address - memory) / WORKLOAD_BLOCK_BYTES;
    siglongjmp(worker->gone, 1);
}

static void install(void)
{
    struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
    sigaction(SIGBUS, &action, NULL);
}

void gone_watch(struct worker *worker)
{
    toucher = worker;
    pthread_once(&installed, install);
}
