/* The fault loop: reads the guest's page faults and asks the source for what is not here, and takes its answers.
 *
 * One thread does both, since a wake-up costs more than everything else on this path: the thread that asked is the one
 * that maps the answer. It never blocks on the network: the send is non-blocking, and what does not fit stays in a fixed
 * buffer of request frames; beyond that it stays REQUESTED in the state bytes, which are searched when there is room again.
 * Faults are read first whatever the network does. A fault right ahead of bulk waits a moment before the source is asked (patience.h).
 *
 * Without a connection (socket -1: it has been lost, epoch.c) it resolves what is here; what is not waits, and is asked for in the
 * next epoch. A guest may ask for REMOVE events besides: they are applied as they are read, before anything else is done (discard.c). */
#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>

#include "inbox.h"
#include "../uffd/kernel.h"
#include "patience.h"
#include "poller.h"
#include "result.h"
#include "schedule.h"

#define EVENTS_PER_READ 64
#define REQUESTS_QUEUED_MAX 1024
#define AROUND_BYTES (64u << 10)

struct request_queue {
    struct frame_header frame[REQUESTS_QUEUED_MAX];
    size_t sent_bytes, queued_bytes; /* frame bytes [sent, queued) are still to go */
    bool overflowed;                 /* a page is REQUESTED, not asked for, and not in here */
};

struct fault_context {
    struct destination *destination;
    struct inbox inbox;
    struct request_queue queue;
    struct patience patience;
    struct poller poller;
};

static bool queue_request(struct fault_context *context, const struct region *region, uint64_t page_index)
{
    struct destination *destination = context->destination;
    struct request_queue *queue = &context->queue;
    if (queue->queued_bytes == sizeof(queue->frame)) {
        queue->overflowed = true;
        return false;
    }
    _Atomic uint8_t *copies = &destination->copies[region->first_page + page_index];
    if (atomic_fetch_or_explicit(copies, COPY_ASKED, memory_order_relaxed) & (COPY_ASKED | COPY_WHOLE))
        return true; /* a page in chunks whose last one has just come */
    queue->frame[queue->queued_bytes / FRAME_HEADER_BYTES] = (struct frame_header){
        .magic = FRAME_MAGIC,
        .kind = FRAME_REQUEST,
        .region = (uint32_t)(region - destination->memory.regions),
        .page_index = page_index,
        .length_bytes = region->memory.page_bytes,
    };
    queue->queued_bytes += FRAME_HEADER_BYTES;
    count(&destination->requests_sent, 1);
    count(&destination->requests_outstanding, 1);
    return true;
}

/* A fault waits for it, and the source does not know. What is RECEIVING is on its way: a page that comes in chunks by bulk perhaps
 * for seconds yet, and in parts, so it is asked for all the same. */
static bool to_be_asked(const struct destination *destination, const struct region *region, uint64_t page_index)
{
    uint8_t seen = page_load(&destination->state[region->first_page + page_index]);
    uint8_t copies = atomic_load_explicit(&destination->copies[region->first_page + page_index], memory_order_relaxed);
    bool waits = PAGE_STATE(seen) == PAGE_REQUESTED || (region->page_chunks > 0 && seen == (PAGE_RECEIVING | PAGE_WANTED));
    return waits && !(copies & COPY_ASKED);
}

/* The queue had no room for some pages: find them in the state bytes. */
static void queue_overflowed(struct fault_context *context)
{
    struct destination *destination = context->destination;
    context->queue.overflowed = false;
    for (uint32_t r = 0; r < destination->memory.region_count; r++) {
        const struct region *region = &destination->memory.regions[r];
        for (uint64_t i = 0; i < region->page_count; i++)
            if (to_be_asked(destination, region, i) && !queue_request(context, region, i))
                return;
    }
}

static bool send_requests(struct fault_context *context, struct loop_result *result)
{
    struct request_queue *queue = &context->queue;
    while (queue->sent_bytes < queue->queued_bytes && context->inbox.channel.socket >= 0) {
        const char *from = (const char *)queue->frame + queue->sent_bytes;
        ssize_t sent_bytes = channel_send(&context->inbox.channel, from, queue->queued_bytes - queue->sent_bytes, result);
        if (sent_bytes < 0)
            return false;
        if (sent_bytes == 0)
            return true; /* the socket is full: poll says when it is not */
        queue->sent_bytes += (size_t)sent_bytes;
        if (queue->sent_bytes == queue->queued_bytes) {
            queue->sent_bytes = queue->queued_bytes = 0;
            if (queue->overflowed)
                queue_overflowed(context);
        }
    }
    return true;
}

/* The content is here. Its neighbours that are here too, in an aligned window, are mapped with it (as the kernel does for
 * files): most touches have neighbours, and a page in a range costs half of what it costs alone. */
static bool map_around(struct fault_context *context, const struct region *region, uint64_t page_index, struct loop_result *result)
{
    const page_byte *state = &context->destination->state[region->first_page];
    uint64_t window_pages = AROUND_BYTES > region->memory.page_bytes ? AROUND_BYTES / region->memory.page_bytes : 1;
    uint64_t first = page_index, end = page_index + 1, least = page_index - page_index % window_pages;
    while (first > least && page_load(&state[first - 1]) == PAGE_PRESENT)
        first--;
    while (end < least + window_pages && end < region->page_count && page_load(&state[end]) == PAGE_PRESENT)
        end++;
    atomic_store_explicit(&context->destination->map_steer, region->first_page + page_index, memory_order_relaxed);
    return destination_map_present(context->destination, region, first, end - first, result);
}

static void count_remote(struct destination *destination, uint64_t page)
{
    count(&destination->faults_remote, 1);
    if (atomic_load_explicit(&destination->settled_ns, memory_order_relaxed) == 0)
        count(&destination->faults_unsettled, 1);
    _Atomic uint8_t *copies = &destination->copies[page];
    if ((atomic_load_explicit(copies, memory_order_relaxed) & (COPY_STALE | COPY_TOUCHED)) == COPY_STALE) {
        atomic_fetch_or_explicit(copies, COPY_TOUCHED, memory_order_relaxed); /* not by WANTED, which a page foreseen has without a fault */
        count(&destination->pages_stale_touched, 1);
    }
}

/* As if faults waited for them, so that whoever brings them maps them; but no fault is counted before there is one. */
static void fetch_foreseen(struct fault_context *context)
{
    struct destination *destination = context->destination;
    eventfd_t count_of_events;
    if (eventfd_read(destination->foreseen_fd, &count_of_events) < 0)
        return;
    for (uint32_t i = 0; i < destination->foreseen_count; i++) {
        uint64_t page = destination->foreseen[i];
        const struct region *region = memory_at_page(&destination->memory, page);
        if (region->page_chunks > 0) /* a fault on another one would wait behind it for as long as it takes */
            continue;
        uint8_t seen = page_want(&destination->state[page]);
        if (seen != PAGE_ABSENT && seen != PAGE_HELD && seen != PAGE_HELD_ZERO)
            continue; /* it is here, or a fault was faster */
        count(&destination->pages_foreseen, 1);
        queue_request(context, region, page - region->first_page);
    }
}

/* The source is asked, unless bulk is about to bring the page. */
static void fetch(struct fault_context *context, const struct region *region, uint64_t page_index, uint64_t now_ns)
{
    struct destination *destination = context->destination;
    uint64_t bulk_next = atomic_load_explicit(&destination->bulk_next, memory_order_relaxed);
    if (region->page_chunks == 0 && patience_put(&context->patience, region->first_page + page_index, bulk_next, now_ns))
        count(&destination->faults_awaited, 1);
    else
        queue_request(context, region, page_index);
}

/* Bulk did not bring these in time. */
static void fetch_awaited(struct fault_context *context)
{
    struct destination *destination = context->destination;
    uint64_t page, now_ns = clock_monotonic_ns();
    while (patience_take(&context->patience, now_ns, &page)) {
        const struct region *region = memory_at_page(&destination->memory, page);
        if (to_be_asked(destination, region, page - region->first_page))
            queue_request(context, region, page - region->first_page);
    }
}

static bool handle_fault(struct fault_context *context, uint64_t address, uint64_t now_ns, struct loop_result *result)
{
    struct destination *destination = context->destination;
    const struct region *region = memory_at_address(&destination->memory, address);
    if (!region) {
        result->got = address;
        return result_fail(result, LOOP_USERFAULTFD_FAILED, EFAULT, "fault address");
    }
    uint64_t page_index = (address - region->memory.guest_address) / region->memory.page_bytes;
    uint64_t page = region->first_page + page_index;
    if (!waiting_put(&destination->waiting, page, now_ns)) /* before WANTED is seen by whoever resolves it */
        count(&destination->faults_untimed, 1);
    uint8_t seen = page_want(&destination->state[page]);
    switch (PAGE_STATE(seen)) {
    case PAGE_HELD:
    case PAGE_HELD_ZERO: /* the stale set has not spoken: only the source knows (P2) */
        count(&destination->faults_held, 1);
        /* fallthrough */
    case PAGE_ABSENT:
        count_remote(destination, page);
        fetch(context, region, page_index, now_ns);
        return true;
    case PAGE_REQUESTED:
    case PAGE_RECEIVING:
        count_remote(destination, page); /* on its way: whoever receives it resolves the fault */
        if (to_be_asked(destination, region, page_index) && region->page_chunks > 0)
            queue_request(context, region, page_index);
        return true;
    case PAGE_ZERO:
    case PAGE_REMOVED:
        count(&destination->faults_zero, 1);
        if (!destination_map_zero(destination, region, page_index, result))
            return false;
        destination_end_wait(destination, page, FAULT_ZERO);
        return true;
    case PAGE_PRESENT: /* received a moment ago, or */
    case PAGE_MAPPED:  /* mapped before and dropped since: swap, MADV_DONTNEED, another thread's fault */
        count(&destination->faults_local, 1);
        if (!map_around(context, region, page_index, result))
            return false;
        destination_end_wait(destination, page, FAULT_LOCAL);
        return true;
    case PAGE_LOST: /* the guest has dropped its page table entry, and with it what had been told to the kernel */
        return destination_poison_again(destination, region, page_index, result);
    default:
        result->got = seen;
        return result_fail(result, LOOP_USERFAULTFD_FAILED, EPROTO, "page state");
    }
}

/* The madvise(2) that raised it goes on as soon as it has been read, and pages of which only a part is discarded stay what they are. */
static bool handle_remove(struct fault_context *context, uint64_t start, uint64_t end, struct loop_result *result)
{
    struct destination *destination = context->destination;
    count(&destination->removes, 1);
    for (uint32_t r = 0; destination->removed_is_zero && r < destination->memory.region_count; r++) {
        const struct region *region = &destination->memory.regions[r];
        uint64_t base = region->memory.guest_address, page_bytes = region->memory.page_bytes;
        uint64_t from = start > base ? start - base : 0, to = end > base ? end - base : 0;
        uint64_t first = (from + page_bytes - 1) / page_bytes, last = to / page_bytes;
        if (last > region->page_count)
            last = region->page_count;
        if (first < last && !destination_remove(destination, region, first, last - first, result))
            return false;
    }
    return true;
}

static bool handle_message(struct fault_context *context, const struct uffd_msg *message, uint64_t now_ns, struct loop_result *result)
{
    if (message->event == UFFD_EVENT_PAGEFAULT)
        return handle_fault(context, message->arg.pagefault.address, now_ns, result);
    if (message->event == UFFD_EVENT_REMOVE)
        return handle_remove(context, message->arg.remove.start, message->arg.remove.end, result);
    return true;
}

static bool read_messages(struct fault_context *context, struct loop_result *result)
{
    struct uffd_msg message[EVENTS_PER_READ];
    ssize_t read_bytes = events_read(context->destination, message, sizeof(message));
    if (read_bytes < 0)
        return errno == EAGAIN || errno == EINTR ? true : result_fail(result, LOOP_USERFAULTFD_FAILED, errno, "read userfaultfd");
    if (read_bytes == 0)
        return result_fail(result, LOOP_GUEST_GONE, 0, "read userfaultfd");
    uint64_t now_ns = clock_monotonic_ns();
    for (size_t i = 0; i < (size_t)read_bytes / sizeof(message[0]); i++)
        if (!handle_message(context, &message[i], now_ns, result))
            return false;
    return true;
}

static bool read_events(struct fault_context *context, struct loop_result *result)
{
    events_begin(context->destination);
    bool good = read_messages(context, result);
    events_end(context->destination);
    return good;
}

static bool fault_round(struct fault_context *context, struct loop_result *result)
{
    struct destination *destination = context->destination;
    bool sending = context->queue.sent_bytes < context->queue.queued_bytes;
    struct pollfd polled[5] = {
        {.fd = destination->userfaultfd, .events = POLLIN},
        {.fd = context->inbox.channel.socket, .events = (short)(POLLIN | (sending ? POLLOUT : 0))},
        {.fd = destination->stop_fd, .events = POLLIN},
        {.fd = context->patience.timer_fd, .events = POLLIN},
        {.fd = destination->foreseen_fd, .events = POLLIN},
    };
    if (!inbox_expect_chunk(&context->inbox, destination, result))
        return false;
    bool here = channel_has_input(&context->inbox.channel);
    if ((here ? poll(polled, 5, 0) : poller_wait(&context->poller, polled, 5, &destination->polled_ns)) < 0)
        return errno == EINTR ? true : result_fail(result, LOOP_USERFAULTFD_FAILED, errno, "poll");
    if (polled[2].revents)
        return result_fail(result, LOOP_STOPPED, 0, "poll");
    if (polled[0].revents & POLLERR) /* a blocking userfaultfd: somebody cleared O_NONBLOCK on a duplicate */
        return result_fail(result, LOOP_USERFAULTFD_FAILED, EBADFD, "poll userfaultfd");
    if ((polled[0].revents & POLLHUP) && !(polled[0].revents & POLLIN))
        return result_fail(result, LOOP_GUEST_GONE, 0, "poll userfaultfd");
    if ((polled[0].revents & POLLIN) && !read_events(context, result))
        return false;
    if (polled[3].revents)
        fetch_awaited(context);
    if (polled[4].revents)
        fetch_foreseen(context);
    if (!send_requests(context, result))
        return false;
    if (here || polled[1].revents & ~POLLOUT)
        return inbox_take(&context->inbox, destination, result);
    return true;
}

void fault_loop(struct destination *destination, int urgent_socket, struct loop_result *result)
{
    result_reset(result);
    struct fault_context context = {.destination = destination, .poller = {.most_ns = destination->poll_ns}};
    int error_number = inbox_init(&context.inbox, destination, urgent_socket, PATH_URGENT);
    if (error_number != 0) {
        result_fail(result, LOOP_MEMORY_FAILED, error_number, "malloc");
        return;
    }
    error_number = patience_init(&context.patience);
    if (error_number != 0) {
        result_fail(result, LOOP_MEMORY_FAILED, error_number, "timerfd_create");
        inbox_deinit(&context.inbox);
        return;
    }
    thread_named("fault");
    schedule_urgent();
    if (destination->recovering) /* what was asked for on another connection is asked for once more */
        queue_overflowed(&context);
    while (fault_round(&context, result))
        ;
    patience_deinit(&context.patience);
    inbox_deinit(&context.inbox);
}
