/* The serve loop: the urgent connection at the source. Reads requests, answers each with its page.
 *
 * P2: it waits at the gate until the guest is paused for good, so what it sends is final. Header and page go out in one
 * send. Bulk goes on behind the page asked for. */
#include <poll.h>
#include <stdlib.h>

#include "channel.h"
#include "poller.h"
#include "result.h"
#include "schedule.h"
#include "source.h"

#define REQUESTS_PER_RECV 256

struct serve_context {
    struct source *source;
    struct channel channel;
    struct poller poller;
    char *page; /* the largest */
    struct frame_header request[REQUESTS_PER_RECV];
    size_t received_bytes;
};

static bool answer_request(struct serve_context *context, const struct frame_header *request, struct loop_result *result)
{
    struct source *source = context->source;
    struct frame_verdict verdict = frame_check(request, 1u << FRAME_REQUEST, source->memory.region_count);
    if (verdict.field != FRAME_FIELD_NONE)
        return result_frame(result, LOOP_FRAME_INVALID, request, verdict);
    const struct region *region = &source->memory.regions[request->region];
    uint64_t page_bytes = region->memory.page_bytes;
    verdict = frame_check_range(request, region->page_count, page_bytes);
    if (verdict.field == FRAME_FIELD_NONE && request->length_bytes != page_bytes)
        verdict = (struct frame_verdict){FRAME_FIELD_LENGTH, page_bytes, request->length_bytes};
    if (verdict.field != FRAME_FIELD_NONE)
        return result_frame(result, LOOP_FRAME_INVALID, request, verdict);

    count(&source->requests, 1);
    uint64_t page = region->first_page + request->page_index;
    source_mark_sent(source, page);
    if (!source_read_pages(region, request->page_index, 1, context->page, result))
        return false;
    bool zero = page_is_zero(context->page, page_bytes);
    struct frame_header header = frame_of_run(source, zero ? FRAME_ZERO : FRAME_PAGES, region, request->page_index, 1);
    struct iovec pieces[2] = {{&header, FRAME_HEADER_BYTES}, {context->page, page_bytes}};
    count(zero ? &source->pages_zero_urgent : &source->pages_urgent, 1);
    count(&source->bytes_urgent, FRAME_HEADER_BYTES + (zero ? 0 : page_bytes));
    if (!channel_send_all(&context->channel, pieces, zero ? 1 : 2, source->stop_fd, result))
        return false;
    atomic_store_explicit(&source->steer, page + 1, memory_order_relaxed);
    return true;
}

static bool wait_for_requests(struct serve_context *context, struct loop_result *result)
{
    struct source *source = context->source;
    struct pollfd polled[2] = {{.fd = context->channel.socket, .events = POLLIN}, {.fd = source->stop_fd, .events = POLLIN}};
    if (poller_wait(&context->poller, polled, 2, &source->polled_ns) < 0 && errno != EINTR)
        return result_fail(result, LOOP_CONNECTION_FAILED, errno, "poll");
    return !polled[1].revents || result_fail(result, LOOP_STOPPED, 0, "poll");
}

static bool serve_round(struct serve_context *context, struct loop_result *result)
{
    if (!wait_for_requests(context, result))
        return false;
    char *buffer = (char *)context->request;
    ssize_t received_bytes = channel_receive(&context->channel, buffer + context->received_bytes,
                                             sizeof(context->request) - context->received_bytes, result);
    if (received_bytes < 0)
        return false;
    context->received_bytes += (size_t)received_bytes;
    size_t whole = context->received_bytes / FRAME_HEADER_BYTES;
    for (size_t i = 0; i < whole; i++)
        if (!answer_request(context, &context->request[i], result))
            return false;
    context->received_bytes -= whole * FRAME_HEADER_BYTES;
    memmove(buffer, buffer + whole * FRAME_HEADER_BYTES, context->received_bytes);
    return true;
}

void serve_loop(struct source *source, int urgent_socket, struct loop_result *result)
{
    result_reset(result);
    struct serve_context context = {.source = source, .channel = {.socket = urgent_socket}, .poller = {.most_ns = source->poll_ns}};
    context.page = malloc(source->memory.page_bytes_max);
    if (!context.page) {
        result_fail(result, LOOP_MEMORY_FAILED, ENOMEM, "malloc");
        return;
    }
    thread_named("serve");
    schedule_urgent();
    if (wait_ready(source->open_fd, POLLIN, source->stop_fd, result))
        while (serve_round(&context, result))
            ;
    free(context.page);
}
