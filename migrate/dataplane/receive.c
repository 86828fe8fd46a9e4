/* The receive loop: a bulk connection at the destination. Waits, receives, takes what is whole (inbox.c, destination.c).
 *
 * After precopy it parks between the source's mark and the guest's resumption here: nothing else runs in a switchover, and
 * nothing is mapped in a guest that may still be refused (P2). */
#include <poll.h>
#include <sys/eventfd.h>

#include "inbox.h"
#include "result.h"
#include "schedule.h"

static bool receive_round(struct inbox *inbox, struct destination *destination, struct loop_result *result)
{
    return inbox_expect_run(inbox, destination, result) && wait_ready(inbox->channel.socket, POLLIN, destination->stop_fd, result) &&
           inbox_take(inbox, destination, result);
}

static bool receive_precopy(struct inbox *inbox, struct destination *destination, struct loop_result *result)
{
    while (inbox->phase == INBOX_PRECOPY)
        if (!receive_round(inbox, destination, result))
            return false;
    eventfd_write(destination->marked_fd, 1);
    if (!wait_ready(destination->open_fd, POLLIN, destination->stop_fd, result))
        return false;
    inbox->phase = INBOX_STALE;
    return inbox_take_buffered(inbox, destination, result);
}

void receive_loop(struct destination *destination, int bulk_socket, bool precopy, struct loop_result *result)
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
    inbox.phase = precopy ? INBOX_PRECOPY : INBOX_FINAL;
    if (!precopy || receive_precopy(&inbox, destination, result))
        while (receive_round(&inbox, destination, result))
            ;
    inbox_deinit(&inbox);
}
