/* A touch that is answered by SIGBUS: the page has been given up (`postcopy abandon`), or its file has been truncated. A failure like
 * any other, told with its page, in place of the end of the process. */
#ifndef POSTCOPY_WORKLOAD_GONE_H
#define POSTCOPY_WORKLOAD_GONE_H

#include "worker.h"

/* Of this thread, from now on: back to where it has set worker->gone, with worker->gone_block set. */
void gone_watch(struct worker *worker);

#endif
