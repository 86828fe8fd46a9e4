/* The serve loop: the urgent connection at the source. Reads requests, answers each with its page.
 *
 * P2: it waits at the gate until the guest is paused for good, so what it sends is final. Header and page go out in one
 * send. Bulk goes on behind the page asked for.
 *
 * Large pages go out in pieces, one after the other when nothing else is asked for (answers.c).
 *
 * Readahead (readahead.c) goes out here too, not by bulk: what bulk has on its way, megabytes, would come first, and with it
 * milliseconds in which the reader asks for each page by itself. Requests are answered between any two pieces of it, and a
 * piece is only sent when the last ones have left the socket: an answer waits behind 64 KiB and what is on the wire. It is a share of
 * what bulk has to send: there is none before bulk begins, nor without bulk. */
#include <poll.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/socket.h>

#include "answers.h"
#include "channel.h"
#include "poller.h"
#include "readahead.h"
#include "result.h"
#include "schedule.h"
#include "source.h"

#define REQUESTS_PER_RECV ANSWERS_MAX
#define PIECE_BYTES (64u << 10)
#define HELPED_BYTES (64u << 20) /* bulk goes on with a larger page itself: what it has on its way is little beside that */
#define MARGIN_BYTES (8u << 20) /* what bulk may have on its way: the reader is to come there when it has arrived */

struct serve_context {
    struct source *source;
    struct channel channel;
    struct poller poller;
    struct readahead readahead;
    struct run_sender ahead, pieces;
    struct answers answers;
    char page[PIECE_BYTES]; /* that goes out whole */
    struct frame_header request[REQUESTS_PER_RECV];
    size_t received_bytes;
};

/* A page that bulk has not sent is asked for: where bulk goes on from there. Behind the page; but a reader in order is served from
 * here, so bulk leaves him room, or he would be upon it at once. */
static uint64_t note_request(struct serve_context *context, const struct region *region, uint64_t page, bool first)
{
    struct source *source = context->source;
    uint64_t page_bytes = region->memory.page_bytes;
    if (region->page_chunks > 0)
        return !first ? STEER_NONE : page_bytes < HELPED_BYTES ? page + 1 : page;
    if (!atomic_load_explicit(&source->streaming, memory_order_acquire))
        return first ? page + 1 : STEER_NONE;
    uint64_t behind = readahead_note(&context->readahead, page, region->first_page + region->page_count);
    if (!first) /* bulk has sent it, and is ahead already */
        return STEER_NONE;
    return behind == page + 1 ? behind : behind + MARGIN_BYTES / page_bytes;
}

static void steer_behind(struct serve_context *context, const struct region *region, uint64_t page, bool first)
{
    uint64_t steer = note_request(context, region, page, first);
    if (steer != STEER_NONE)
        atomic_store_explicit(&context->source->steer, steer, memory_order_relaxed);
}

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
    if (region->page_chunks > 0) {
        answers_put(&context->answers, region, request->page_index);
        steer_behind(context, region, page, !atomic_load_explicit(&source->sent[page], memory_order_relaxed));
        return true;
    }
    bool first = source_mark_sent(source, page);
    if (!source_read_bytes(region, request->page_index * page_bytes, page_bytes, context->page, result))
        return false;
    bool zero = page_is_zero(context->page, page_bytes);
    struct frame_header header =
        frame_of_bytes(source, zero ? FRAME_ZERO : FRAME_PAGES, region, request->page_index * page_bytes, page_bytes);
    struct iovec pieces[2] = {{&header, FRAME_HEADER_BYTES}, {context->page, page_bytes}};
    count(zero ? &source->pages_zero_urgent : &source->pages_urgent, 1);
    count(&source->bytes_urgent, FRAME_HEADER_BYTES + (zero ? 0 : page_bytes));
    if (!channel_send_all(&context->channel, pieces, zero ? 1 : 2, source->stop_fd, result))
        return false;
    steer_behind(context, region, page, first);
    return true;
}

/* What of the window nobody else has sent. */
static bool send_ahead(struct serve_context *context, uint64_t page, uint64_t page_count, struct loop_result *result)
{
    struct source *source = context->source;
    const struct region *region = region_of_page(source, page);
    for (uint64_t end = page + page_count; page < end;) {
        uint64_t run_pages = 0;
        while (page + run_pages < end && source_mark_sent(source, page + run_pages))
            run_pages++;
        if (run_pages > 0 && !run_send(&context->ahead, region, page - region->first_page, run_pages, result))
            return false;
        page += run_pages > 0 ? run_pages : 1;
    }
    return true;
}

/* Wait until a request is there, or there is room for the next piece of an answer, or for what goes out ahead. */
static bool wait_for_work(struct serve_context *context, short *events, struct loop_result *result)
{
    struct source *source = context->source;
    bool pieces = context->answers.count > 0, ahead = readahead_pending(&context->readahead);
    short wanted = (short)((answers_room(&context->answers) > 0 ? POLLIN : 0) | (pieces || ahead ? POLLOUT : 0));
    struct pollfd polled[2] = {{.fd = context->channel.socket, .events = wanted}, {.fd = source->stop_fd, .events = POLLIN}};
    bool here = (wanted & POLLIN) && channel_has_input(&context->channel);
    if ((here ? poll(polled, 2, 0) : poller_wait(&context->poller, polled, 2, &source->polled_ns)) < 0 && errno != EINTR)
        return result_fail(result, LOOP_CONNECTION_FAILED, errno, "poll");
    *events = (short)(polled[0].revents | (here ? POLLIN : 0));
    return !polled[1].revents || result_fail(result, LOOP_STOPPED, 0, "poll");
}

static bool serve_round(struct serve_context *context, struct loop_result *result)
{
    short events = 0;
    uint64_t page, page_count;
    if (!wait_for_work(context, &events, result))
        return false;
    if (events == POLLOUT && context->answers.count > 0)
        return answers_send(&context->answers, &context->pieces, result);
    if (events == POLLOUT && readahead_next(&context->readahead, &page, &page_count))
        return send_ahead(context, page, page_count, result);
    char *buffer = (char *)context->request;
    size_t room_bytes = answers_room(&context->answers) * sizeof(context->request[0]);
    if (room_bytes <= context->received_bytes) /* a hang-up, while a request more could not be remembered */
        return answers_send(&context->answers, &context->pieces, result);
    ssize_t received_bytes =
        channel_receive(&context->channel, buffer + context->received_bytes, room_bytes - context->received_bytes, result);
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

/* What waits in the socket to be sent waits in front of the next answer. */
static void keep_socket_short(int urgent_socket)
{
    int unsent_bytes = 2 * PIECE_BYTES; /* room is told when half of it is left */
    setsockopt(urgent_socket, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &unsent_bytes, sizeof(unsent_bytes)); /* where it is TCP */
}

void serve_loop(struct source *source, int urgent_socket, struct loop_result *result)
{
    result_reset(result);
    struct serve_context context = {.source = source, .channel = channel_of(urgent_socket), .poller = {.most_ns = source->poll_ns}};
    if (run_sender_init(&context.ahead, source, urgent_socket, RUN_AHEAD) != 0 ||
        run_sender_init(&context.pieces, source, urgent_socket, RUN_URGENT) != 0) {
        result_fail(result, LOOP_MEMORY_FAILED, ENOMEM, "malloc");
        run_sender_deinit(&context.ahead);
        run_sender_deinit(&context.pieces);
        return;
    }
    keep_socket_short(urgent_socket);
    thread_named("serve");
    schedule_urgent();
    if (wait_ready(source->open_fd, POLLIN, source->stop_fd, result))
        while (serve_round(&context, result))
            ;
    run_sender_deinit(&context.ahead);
    run_sender_deinit(&context.pieces);
}
