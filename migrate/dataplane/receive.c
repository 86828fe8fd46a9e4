/* The receive loop: a bulk connection at the destination. Waits, receives, takes what is whole (inbox.c, destination.c).
 *
 * After precopy it parks between the source's mark and the guest's resumption here: nothing else runs in a switchover, and
 * nothing is mapped in a guest that may still be refused (P2). The last one to park says so for all: only then is nothing in
 * flight. The first connection brings the stale set; the others stay parked until it has been applied, since a page that is
 * still held would refuse its final content (a source that heeds the protocol sends none before it knows what is lacking). */
#include <poll.h>
#include <sys/eventfd.h>

#include "inbox.h"
#include "precopied.h"
#include "result.h"
#include "schedule.h"

static bool receive_round(struct inbox *inbox, struct destination *destination, struct loop_result *result)
{
    return inbox_expect_run(inbox, destination, result) && channel_wait(&inbox->channel, destination->stop_fd, result) &&
           inbox_take(inbox, destination, result);
}

static bool receive_precopy(struct inbox *inbox, struct destination *destination, uint32_t stream, struct loop_result *result)
{
    while (inbox->phase == INBOX_PRECOPY)
        if (!receive_round(inbox, destination, result))
            return false;
    if (atomic_fetch_add(&destination->marks, 1) + 1 == destination->streams)
        eventfd_write(destination->marked_fd, 1);
    int unpark_fd = stream == 0 ? destination->open_fd : destination->judged_fd;
    if (!wait_ready(unpark_fd, POLLIN, destination->stop_fd, result))
        return false;
    inbox->phase = stream == 0 ? INBOX_STALE : INBOX_FINAL;
    return inbox_take_buffered(inbox, destination, result);
}

/* In a later epoch: the first connection goes on with the stale set if that has not been applied, else it says what is lacking. */
static bool receive_again(struct inbox *inbox, struct destination *destination, uint32_t stream, struct loop_result *result)
{
    bool settled = destination_is_settled(destination);
    if (stream == 0 && settled)
        return settle_end(destination, &inbox->channel, result);
    if (stream == 0)
        inbox->phase = INBOX_STALE;
    return stream == 0 || settled || wait_ready(destination->judged_fd, POLLIN, destination->stop_fd, result);
}

void receive_loop(struct destination *destination, int bulk_socket, uint32_t stream, bool precopy, struct loop_result *result)
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
    bool begun = true;
    if (precopy)
        begun = receive_precopy(&inbox, destination, stream, result);
    else if (destination->recovering)
        begun = receive_again(&inbox, destination, stream, result);
    if (begun)
        while (receive_round(&inbox, destination, result))
            ;
    inbox_deinit(&inbox);
}
