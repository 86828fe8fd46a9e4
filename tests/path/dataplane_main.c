/* The data plane without Python: the same objects under a plain C main, so that sanitizers see every loop.
 *   dataplane-main SCENARIO...   moves | streams | faults-only | late-copies | hugetlb | bad-frames | readahead | patience
 * One process holds both halves and the guest's threads (that is safe in C; in Python it would deadlock on the GIL).
 * Exit 0: all that was asked for held. 77: the machine lacks it (hugetlb). */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel.h"
#include "dataplane.h"
#include "frame.h"
#include "kernel.h"
#include "mapping.h"
#include "pages.h"
#include "patience.h"
#include "uffd.h"
#include "../check.h"

#define TOUCHERS 2

/* A bulk connection beside the first one. */
struct another {
    struct move *move;
    uint32_t stream;
    int bulk[2];
    struct loop_result receive_result, stream_result, step_result;
    pthread_t receive, streamed, step;
};

struct move {
    uint64_t page_count, page_bytes;
    uint32_t others; /* bulk connections beside the first one */
    struct another other[STREAMS_MAX - 1];
    bool hugetlb;
    int source_fd, destination_fd, userfaultfd;
    char *guest;
    int urgent[2], bulk[2]; /* [0] destination's end, [1] source's */
    struct destination *destination;
    struct source *source;
    struct loop_result fault_result, receive_result, serve_result, stream_result;
    pthread_t fault, receive, serve, stream;
    bool with_bulk;
    bool remove_events; /* of the guest at the destination; */
    bool removed_keeps; /* they mean nothing: it drops pages by MADV_DONTNEED */
};

/* What page i holds at the source: a stamp in every word, or zeroes for every fourth page. */
static uint64_t stamp(uint64_t page)
{
    return page % 4 == 3 ? 0 : (page + 1) * UINT64_C(0x9e3779b97f4a7c15);
}

static int memory_file(const struct move *move)
{
    int fd = memfd_create("dataplane-main", MFD_CLOEXEC | MFD_ALLOW_SEALING | (move->hugetlb ? MFD_HUGETLB : 0));
    if (fd < 0 && move->hugetlb)
        exit(77);
    CHECK(fd >= 0 && ftruncate(fd, (off_t)(move->page_count * move->page_bytes)) == 0);
    return fd;
}

static void fill_source(struct move *move)
{
    size_t size_bytes = move->page_count * move->page_bytes;
    char *memory = mmap(NULL, size_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, move->source_fd, 0);
    if (memory == MAP_FAILED && move->hugetlb)
        exit(77);
    CHECK(memory != MAP_FAILED);
    for (uint64_t page = 0; page < move->page_count; page++)
        for (uint64_t word = 0; stamp(page) != 0 && word < move->page_bytes / 8; word++)
            ((uint64_t *)(memory + page * move->page_bytes))[word] = stamp(page);
    munmap(memory, size_bytes);
}

static void *run_fault(void *of)
{
    struct move *move = of;
    fault_loop(move->destination, move->urgent[0], &move->fault_result);
    return NULL;
}
static void *run_receive(void *of)
{
    struct move *move = of;
    receive_loop(move->destination, move->bulk[0], 0, false, &move->receive_result);
    return NULL;
}
static void *run_serve(void *of)
{
    struct move *move = of;
    serve_loop(move->source, move->urgent[1], &move->serve_result);
    return NULL;
}
static void *run_stream(void *of)
{
    struct move *move = of;
    stream_loop(move->source, move->bulk[1], 0, &move->stream_result);
    return NULL;
}

static void *run_another_receive(void *of)
{
    struct another *another = of;
    receive_loop(another->move->destination, another->bulk[0], another->stream, false, &another->receive_result);
    return NULL;
}
static void *run_another_stream(void *of)
{
    struct another *another = of;
    stream_loop(another->move->source, another->bulk[1], another->stream, &another->stream_result);
    return NULL;
}

static void others_connected(struct move *move)
{
    destination_streams(move->destination, 1 + move->others);
    source_streams(move->source, 1 + move->others);
    for (uint32_t i = 0; i < move->others; i++) {
        move->other[i] = (struct another){.move = move, .stream = 1 + i};
        CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, move->other[i].bulk) == 0);
    }
}

static void others_begin(struct move *move, void *(*run_receive_of_another)(void *))
{
    for (uint32_t i = 0; i < move->others; i++)
        pthread_create(&move->other[i].receive, NULL, run_receive_of_another, &move->other[i]);
}

static void others_stream(struct move *move)
{
    for (uint32_t i = 0; i < move->others; i++)
        pthread_create(&move->other[i].streamed, NULL, run_another_stream, &move->other[i]);
}

static void move_begin(struct move *move)
{
    size_t size_bytes = move->page_count * move->page_bytes;
    move->source_fd = memory_file(move);
    move->destination_fd = memory_file(move);
    fill_source(move);
    move->guest = mapping_reserve(size_bytes);
    CHECK(move->guest && mapping_place(move->guest, size_bytes, move->destination_fd, 0) == 0);
    struct uffd_opened opened;
    uffd_open(1, &opened);
    CHECK(opened.fd >= 0);
    move->userfaultfd = opened.fd;
    uint64_t features = UFFD_FEATURE_MINOR_SHMEM | UFFD_FEATURE_MINOR_HUGETLBFS, ioctls;
    features |= move->remove_events ? UFFD_FEATURE_EVENT_REMOVE : 0;
    CHECK(uffd_api(move->userfaultfd, &features) == 0);
    CHECK(uffd_register(move->userfaultfd, (uint64_t)(uintptr_t)move->guest, size_bytes,
                        UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR, &ioctls) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, move->urgent) == 0);
    CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, move->bulk) == 0);
    struct memory_region region = {.guest_address = (uint64_t)(uintptr_t)move->guest, .size_bytes = size_bytes,
                                   .page_bytes = (uint32_t)move->page_bytes, .memory_fd = move->destination_fd};
    int error_number = 0;
    move->destination = destination_create(&region, 1, move->userfaultfd, &error_number);
    CHECK(move->destination);
    if (move->remove_events && !move->removed_keeps)
        destination_removed_is_zero(move->destination);
    region.memory_fd = move->source_fd;
    move->source = source_create(&region, 1, &error_number);
    CHECK(move->source);
    others_connected(move);
}

static void loops_begin(struct move *move)
{
    pthread_create(&move->fault, NULL, run_fault, move);
    pthread_create(&move->receive, NULL, run_receive, move);
    pthread_create(&move->serve, NULL, run_serve, move);
    pthread_create(&move->stream, NULL, run_stream, move);
    others_begin(move, run_another_receive);
    others_stream(move);
    destination_open(move->destination);
    source_open(move->source);
    if (move->with_bulk)
        source_open_bulk(move->source);
}

static void loops_end(struct move *move)
{
    destination_stop(move->destination);
    pthread_join(move->fault, NULL);
    pthread_join(move->receive, NULL);
    source_stop(move->source);
    pthread_join(move->serve, NULL);
    pthread_join(move->stream, NULL);
    for (uint32_t i = 0; i < move->others; i++) {
        pthread_join(move->other[i].receive, NULL);
        pthread_join(move->other[i].streamed, NULL);
        CHECK(move->other[i].receive_result.reason == LOOP_STOPPED);
        int32_t why = move->other[i].stream_result.reason; /* the others may have sent all, and the move be over, before it looks */
        CHECK(why == LOOP_FINISHED || why == LOOP_STOPPED);
    }
}

static void wait_final(struct move *move)
{
    uint64_t value;
    struct loop_result ignored;
    int fd = destination_final_fd(move->destination);

    CHECK(wait_ready(fd, 1 /* POLLIN */, -1, &ignored));
    CHECK(read(fd, &value, sizeof(value)) == sizeof(value));
}

static void move_end(struct move *move)
{
    munmap(move->guest, move->page_count * move->page_bytes);
    destination_destroy(move->destination);
    source_destroy(move->source);
    int descriptors[] = {move->source_fd, move->destination_fd, move->userfaultfd,
                         move->urgent[0], move->urgent[1], move->bulk[0], move->bulk[1]};
    for (size_t i = 0; i < sizeof(descriptors) / sizeof(descriptors[0]); i++)
        close(descriptors[i]);
    for (uint32_t i = 0; i < 2 * move->others; i++)
        close(move->other[i / 2].bulk[i % 2]);
}

struct toucher {
    struct move *move;
    uint64_t seed;
    pthread_t thread;
};

/* Touch all pages of this toucher's half in a scattered order: check them and write a mark into word 1. */
static void *run_toucher(void *of)
{
    struct toucher *toucher = of;
    struct move *move = toucher->move;
    uint64_t half = move->page_count / TOUCHERS;
    for (uint64_t i = 0; i < half; i++) {
        uint64_t page = (i * 7919 + toucher->seed) % half * TOUCHERS + toucher->seed;
        volatile uint64_t *words = (volatile uint64_t *)(move->guest + page * move->page_bytes);
        CHECK(words[0] == stamp(page));
        words[1] = ~page;
        CHECK(words[move->page_bytes / 8 - 1] == stamp(page));
    }
    return NULL;
}

static void touch_all(struct move *move)
{
    struct toucher touchers[TOUCHERS];
    for (uint64_t i = 0; i < TOUCHERS; i++) {
        touchers[i] = (struct toucher){.move = move, .seed = i};
        pthread_create(&touchers[i].thread, NULL, run_toucher, &touchers[i]);
    }
    for (uint64_t i = 0; i < TOUCHERS; i++)
        pthread_join(touchers[i].thread, NULL);
}

/* Every page as the guest left it: its mark, and the source's bytes around it. */
static void check_all(const struct move *move)
{
    for (uint64_t page = 0; page < move->page_count; page++) {
        const uint64_t *words = (const uint64_t *)(move->guest + page * move->page_bytes);
        CHECK(words[1] == ~page);
        for (uint64_t word = 0; word < move->page_bytes / 8; word++)
            CHECK(word == 1 || words[word] == stamp(page));
    }
}

static void moves(struct move *move)
{
    move->with_bulk = true;
    move_begin(move);
    loops_begin(move);
    touch_all(move);
    wait_final(move);
    loops_end(move);
    struct loop_result finished;
    destination_finish(move->destination, &finished);
    CHECK(finished.reason == LOOP_FINISHED);
    CHECK(move->fault_result.reason == LOOP_STOPPED && move->receive_result.reason == LOOP_STOPPED);
    CHECK(move->serve_result.reason == LOOP_STOPPED);
    CHECK(move->stream_result.reason == LOOP_FINISHED || (move->others > 0 && move->stream_result.reason == LOOP_STOPPED));
    check_all(move);
    struct destination_figures figures;
    destination_read(move->destination, &figures);
    CHECK(figures.pages_urgent + figures.pages_readahead + figures.pages_bulk + figures.pages_zero == move->page_count);
    CHECK(figures.pages_final == move->page_count && figures.faults_untimed == 0);
    struct source_figures sent;
    source_read(move->source, &sent);
    CHECK(sent.pages_sent == move->page_count);
    move_end(move);
}

/* No bulk: exactly one fault, one request and one page a page. */
static void faults_only(struct move *move)
{
    move_begin(move);
    loops_begin(move);
    touch_all(move);
    wait_final(move);
    loops_end(move);
    struct loop_result finished;
    destination_finish(move->destination, &finished);
    CHECK(finished.reason == LOOP_FINISHED);
    check_all(move);
    struct destination_figures figures;
    destination_read(move->destination, &figures);
    CHECK(figures.faults_remote == move->page_count && figures.requests_sent == move->page_count);
    CHECK(figures.pages_urgent + figures.pages_zero == move->page_count);
    CHECK(figures.pages_dropped == 0 && figures.wakes == 0 && figures.requests_outstanding == 0);
    struct histogram_copy latency;
    destination_latency(move->destination, FAULT_REMOTE, &latency);
    CHECK(latency.count == move->page_count);
    move_end(move);
}

static void send_exactly(int socket_fd, const void *bytes, size_t size_bytes)
{
    CHECK(send(socket_fd, bytes, size_bytes, MSG_NOSIGNAL) == (ssize_t)size_bytes);
}

/* P1: every page is fetched by a fault and written by the guest; then all pages come once more by bulk, as a source may
 * send them. Not one of the guest's writes may be undone. */
static void late_copies(struct move *move)
{
    move_begin(move);
    loops_begin(move);
    touch_all(move);
    char *page_buffer = malloc(move->page_bytes);
    for (uint64_t page = 0; page < move->page_count; page++) {
        struct frame_header header = {.magic = FRAME_MAGIC, .kind = stamp(page) ? FRAME_PAGES : FRAME_ZERO, .page_index = page,
                                      .length_bytes = (uint32_t)move->page_bytes};
        CHECK(pread(move->source_fd, page_buffer, move->page_bytes, (off_t)(page * move->page_bytes)) == (ssize_t)move->page_bytes);
        send_exactly(move->bulk[1], &header, sizeof(header));
        if (stamp(page))
            send_exactly(move->bulk[1], page_buffer, move->page_bytes);
    }
    free(page_buffer);
    shutdown(move->bulk[1], SHUT_WR); /* the receive loop ends when it has read all of it */
    pthread_join(move->receive, NULL);
    CHECK(move->receive_result.reason == LOOP_PEER_CLOSED);
    destination_stop(move->destination);
    pthread_join(move->fault, NULL);
    source_stop(move->source);
    pthread_join(move->serve, NULL);
    pthread_join(move->stream, NULL);
    struct loop_result finished;
    destination_finish(move->destination, &finished);
    CHECK(finished.reason == LOOP_FINISHED);
    check_all(move);
    struct destination_figures figures;
    destination_read(move->destination, &figures);
    CHECK(figures.pages_dropped == move->page_count);
    move_end(move);
}

static struct loop_result result_of_bulk_frames(struct move *move, const struct frame_header *frames, size_t frame_count)
{
    move_begin(move);
    send_exactly(move->bulk[1], frames, frame_count * sizeof(*frames));
    receive_loop(move->destination, move->bulk[0], 0, false, &move->receive_result);
    move_end(move);
    return move->receive_result;
}

static void bad_frames(struct move *move)
{
    struct frame_header good = {.magic = FRAME_MAGIC, .kind = FRAME_ZERO, .page_index = 1, .length_bytes = (uint32_t)move->page_bytes};
    struct frame_header twice[2] = {good, good};
    struct loop_result result = result_of_bulk_frames(move, twice, 2);
    CHECK(result.reason == LOOP_PAGE_DUPLICATE && result.page_index == 1);

    struct {
        enum frame_field field;
        struct frame_header frame;
    } bad[] = {{FRAME_FIELD_MAGIC, good},  {FRAME_FIELD_KIND, good},   {FRAME_FIELD_FLAGS, good}, {FRAME_FIELD_REGION, good},
               {FRAME_FIELD_OFFSET, good}, {FRAME_FIELD_PAGE_INDEX, good}, {FRAME_FIELD_LENGTH, good}};
    bad[0].frame.magic = 7;
    bad[1].frame.kind = FRAME_REQUEST;
    bad[2].frame.flags = FRAME_FLAG_MORE;
    bad[3].frame.region = 1;
    bad[4].frame.offset_bytes = 1;
    bad[5].frame.page_index = move->page_count;
    bad[6].frame.length_bytes = (uint32_t)(move->page_bytes * move->page_count); /* one beyond the end, since it starts at 1 */
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        result = result_of_bulk_frames(move, &bad[i].frame, 1);
        CHECK(result.reason == LOOP_FRAME_INVALID && result.field == bad[i].field);
    }

    move_begin(move); /* the same frame on the urgent connection answers nothing that was asked */
    send_exactly(move->urgent[1], &good, sizeof(good));
    fault_loop(move->destination, move->urgent[0], &move->fault_result);
    CHECK(move->fault_result.reason == LOOP_PAGE_UNASKED && move->fault_result.page_index == 1);
    destination_finish(move->destination, &result);
    CHECK(result.reason == LOOP_INCOMPLETE && result.page_index == 0); /* P3: and nothing was unregistered */
    move_end(move);

    move_begin(move); /* a request beyond the region ends the serve loop */
    struct frame_header request = good;
    request.kind = FRAME_REQUEST;
    request.page_index = move->page_count + 5;
    send_exactly(move->urgent[0], &request, sizeof(request));
    source_open(move->source);
    serve_loop(move->source, move->urgent[1], &move->serve_result);
    CHECK(move->serve_result.reason == LOOP_FRAME_INVALID && move->serve_result.field == FRAME_FIELD_PAGE_INDEX);
    CHECK(move->serve_result.expected == move->page_count && move->serve_result.got == move->page_count + 5);
    move_end(move);
}

/* Wait until so many pages are final. */
static void wait_pages_final(const struct move *move, uint64_t page_count)
{
    struct destination_figures figures;
    do
        destination_read(move->destination, &figures);
    while (figures.pages_final < page_count);
    CHECK(figures.pages_final == page_count);
}

static void touch(const struct move *move, uint64_t page)
{
    CHECK(*(volatile uint64_t *)(move->guest + page * move->page_bytes) == stamp(page));
}

/* Bulk has begun, and is stuck in its first run: nobody reads it. So what comes beside the answers is readahead. */
static void begin_with_bulk_stuck(struct move *move)
{
    move_begin(move);
    destination_open(move->destination);
    pthread_create(&move->fault, NULL, run_fault, move);
    pthread_create(&move->serve, NULL, run_serve, move);
    pthread_create(&move->stream, NULL, run_stream, move);
    source_open(move->source);
    source_open_bulk(move->source);
    struct source_figures figures;
    do
        source_read(move->source, &figures);
    while (figures.pages_sent < 256);
}

/* One fault a window, and a window that doubles: 0, 4, 8, ... 64 pages. Two readers at once have a window each; what is touched
 * at random has none, and pushes nobody's out. */
static void reads_ahead(struct move *move)
{
    begin_with_bulk_stuck(move);
    uint64_t reader[2] = {512, 2048}, window[2] = {0, 0}, stalls = 0, final = 0, ahead = 0;
    for (uint64_t turn = 0; turn < 20; turn++) {
        uint64_t *at = &reader[turn % 2], *pages = &window[turn % 2];
        final += 1 + *pages;
        ahead += *pages;
        touch(move, *at);
        stalls++;
        wait_pages_final(move, final);
        for (uint64_t i = 1; i <= *pages; i++)
            touch(move, *at + i);
        *at += 1 + *pages;
        *pages = *pages == 0 ? 4 : *pages < 64 ? 2 * *pages : 64;
        for (uint64_t i = 0; i < 3; i++, stalls++, final++) /* 20 pages apart or more, and backwards */
            touch(move, 4000 - (turn * 3 + i) * 20);
    }
    wait_pages_final(move, final);
    struct destination_figures figures;
    destination_read(move->destination, &figures);
    CHECK(figures.faults_remote == stalls && figures.requests_sent == stalls && figures.faults_zero + figures.faults_local <= ahead);
    CHECK(figures.pages_urgent + figures.pages_readahead + figures.pages_zero == final && figures.pages_dropped == 0);
    struct source_figures sent;
    source_read(move->source, &sent);
    CHECK(sent.requests == stalls && sent.pages_readahead + sent.pages_zero_readahead == ahead);
    CHECK(sent.bytes_readahead == figures.bytes_readahead && sent.bytes_urgent == figures.bytes_urgent);
    destination_stop(move->destination);
    source_stop(move->source);
    pthread_join(move->fault, NULL);
    pthread_join(move->serve, NULL);
    pthread_join(move->stream, NULL);
    CHECK(move->fault_result.reason == LOOP_STOPPED && move->stream_result.reason == LOOP_STOPPED);
    move_end(move);
}

static void expect_request(const struct move *move, uint64_t page)
{
    struct frame_header request;
    CHECK(recv(move->urgent[1], &request, sizeof(request), MSG_WAITALL) == sizeof(request));
    CHECK(request.kind == FRAME_REQUEST && request.page_index == page);
}

static void send_zeroes(int socket_fd, uint64_t page, uint64_t page_count)
{
    struct frame_header zeroes = {.magic = FRAME_MAGIC, .kind = FRAME_ZERO, .page_index = page, .length_bytes = (uint32_t)page_count * 4096};
    send_exactly(socket_fd, &zeroes, sizeof(zeroes));
}

static void *touch_in_order(void *of)
{
    struct move *move = of;
    for (uint64_t page = 100; page < 300; page += 100)
        CHECK(*(volatile uint64_t *)(move->guest + page * move->page_bytes) == 0);
    return NULL;
}

/* A fault that follows another, right ahead of bulk, is not asked for at once; but it is when bulk does not bring it. */
static void patience(struct move *move)
{
    struct patience waits;
    uint64_t page;
    CHECK(patience_init(&waits) == 0);
    CHECK(!patience_put(&waits, 500, 500, 1000));  /* follows none */
    CHECK(!patience_put(&waits, 600, 601, 1000));  /* bulk is beyond it */
    CHECK(!patience_put(&waits, 900, 700, 1000));  /* or far behind */
    CHECK(!patience_put(&waits, 5000, 5000, 1000)); /* follows none closely */
    CHECK(patience_put(&waits, 700, 690, 1000) && patience_put(&waits, 701, 690, 2000));
    CHECK(!patience_take(&waits, 200999, &page));
    CHECK(patience_take(&waits, 201000, &page) && page == 700);
    CHECK(!patience_take(&waits, 201000, &page));
    CHECK(patience_take(&waits, 202000, &page) && page == 701);
    CHECK(!patience_take(&waits, UINT64_MAX, &page));
    for (uint64_t i = 0; i < PATIENCE_WAITS; i++)
        CHECK(patience_put(&waits, 702 + i, 690, 3000));
    CHECK(!patience_put(&waits, 800, 690, 3000)); /* all places are taken */
    patience_deinit(&waits);

    move_begin(move);
    pthread_t toucher;
    pthread_create(&move->fault, NULL, run_fault, move);
    pthread_create(&move->receive, NULL, run_receive, move);
    pthread_create(&toucher, NULL, touch_in_order, move);
    expect_request(move, 100);
    send_zeroes(move->bulk[1], 150, 50); /* bulk is at page 200 */
    wait_pages_final(move, 50);
    send_zeroes(move->urgent[1], 100, 1);
    expect_request(move, 200); /* though it waited for bulk first */
    struct destination_figures figures;
    destination_read(move->destination, &figures);
    CHECK(figures.faults_awaited == 1 && figures.requests_sent == 2);
    send_zeroes(move->urgent[1], 200, 1);
    pthread_join(toucher, NULL);
    destination_stop(move->destination);
    pthread_join(move->fault, NULL);
    pthread_join(move->receive, NULL);
    move_end(move);
}

/* Pages of which the guest has said that it stands on them are asked for without a fault, once, and mapped when they come; what is no
 * page of it is not. */
static void foreseen(struct move *move)
{
    move_begin(move);
    pthread_create(&move->fault, NULL, run_fault, move);
    uint64_t named[FORESEEN_MAX + 4] = {50, move->page_count, 50, UINT64_MAX}; /* the third for the second time */
    for (uint64_t i = 4; i < FORESEEN_MAX + 4; i++) /* the last two are beyond the bound */
        named[i] = 66 + i;
    destination_foresee(move->destination, named, FORESEEN_MAX + 4);
    for (uint64_t i = 0; i < FORESEEN_MAX - 1; i++) {
        expect_request(move, i == 0 ? 50 : 69 + i);
        send_zeroes(move->urgent[1], i == 0 ? 50 : 69 + i, 1);
    }
    wait_pages_final(move, FORESEEN_MAX - 1);
    CHECK(*(volatile uint64_t *)(move->guest + 70 * move->page_bytes) == 0);
    struct destination_figures figures;
    destination_read(move->destination, &figures);
    CHECK(figures.pages_foreseen == FORESEEN_MAX - 1 && figures.requests_sent == figures.pages_foreseen);
    CHECK(figures.requests_outstanding == 0 && figures.pages_zero == figures.pages_foreseen);
    CHECK(figures.faults_remote == 0 && figures.faults_local == 0 && figures.faults_zero == 0);
    destination_stop(move->destination);
    pthread_join(move->fault, NULL);
    move_end(move);
}

int main(int argc, char **argv)
{
    alarm(110);
    for (int i = 1; i < argc; i++) {
        struct move move = {.page_count = 4096, .page_bytes = 4096};
        if (strcmp(argv[i], "moves") == 0) {
            moves(&move);
        } else if (strcmp(argv[i], "streams") == 0) {
            move.others = 2;
            moves(&move);
        } else if (strcmp(argv[i], "faults-only") == 0) {
            faults_only(&move);
        } else if (strcmp(argv[i], "late-copies") == 0) {
            late_copies(&move);
        } else if (strcmp(argv[i], "hugetlb") == 0) {
            move = (struct move){.page_count = 16, .page_bytes = 2u << 20, .hugetlb = true};
            moves(&move);
        } else if (strcmp(argv[i], "bad-frames") == 0) {
            bad_frames(&move);
        } else if (strcmp(argv[i], "readahead") == 0) {
            reads_ahead(&move);
        } else if (strcmp(argv[i], "patience") == 0) {
            patience(&move);
        } else if (strcmp(argv[i], "foreseen") == 0) {
            foreseen(&move);
        } else {
            fprintf(stderr, "usage: dataplane-main moves|streams|faults-only|late-copies|hugetlb|bad-frames|readahead|patience|foreseen ...\n");
            return 2;
        }
        printf("%s: held\n", argv[i]);
    }
    return 0;
}
