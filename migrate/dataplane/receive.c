/* The receive loop: a bulk connection at the destination. Waits, receives, takes what is whole (inbox.c, destination.c).
 *
 * Not handled: pages larger than the hot buffer in chunks (FRAME_FLAG_MORE is refused). */
#include <poll.h>

#include "inbox.h"
#include "result.h"
#include "schedule.h"

void receive_loop(struct destination *destination, int bulk_socket, struct loop_result *result)
{
    result_reset(result);
    struct inbox inbox;
    int error_number = inbox_init(&inbox, destination, bulk_socket, PATH_BULK);
    if (error_number != 0) {
        result_fail(result, LOOP_MEMORY_FAILED, error_number, "malloc");
        return;
    }
    thread_named("receive");
    schedule_bulk();
    while (inbox_expect_run(&inbox, result) && wait_ready(bulk_socket, POLLIN, destination->stop_fd, result) &&
           inbox_take(&inbox, destination, result))
        ;
    inbox_deinit(&inbox);
}
