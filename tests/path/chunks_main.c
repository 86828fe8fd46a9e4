/* Large pages in pieces: chunks-main SCENARIO...   scattered | cut | bad-pieces | discards | between
 * The test itself plays the peer, frame by frame, so that pieces come in any order, by any connection, twice, or not at all. Pages of 2 MiB
 * on hugetlbfs, every fifth chunk of zeroes. On top of the data plane's own test main. */
int main_of_the_data_plane(int argc, char **argv);
#define main main_of_the_data_plane
#include "dataplane_main.c"
#undef main

#define PAGES 8
#define LARGE_BYTES (2u << 20)
#define CHUNKS (LARGE_BYTES / FRAME_CHUNK_BYTES)
#define CHUNK_WORDS (FRAME_CHUNK_BYTES / 8)

static char one_chunk[FRAME_CHUNK_BYTES];

static bool zero_chunk(uint64_t chunk)
{
    return chunk % 5 == 0;
}

static uint64_t word_of(uint64_t chunk, uint64_t word)
{
    return zero_chunk(chunk) ? 0 : (chunk * CHUNK_WORDS + word) * UINT64_C(0x9e3779b97f4a7c15);
}

/* Chunk by chunk, counted from the first of page 0. */
static void begin(struct move *move)
{
    *move = (struct move){.page_count = PAGES, .page_bytes = LARGE_BYTES, .hugetlb = true};
    move_begin(move);
    struct loop_result result;
    destination_back(move->destination, &result);
    CHECK(result.reason == LOOP_FINISHED);
}

static void send_piece(int socket_fd, uint64_t chunk)
{
    struct frame_header header = {.magic = FRAME_MAGIC, .kind = zero_chunk(chunk) ? FRAME_ZERO : FRAME_PAGES, .page_index = chunk / CHUNKS,
                                  .offset_bytes = (uint32_t)(chunk % CHUNKS * FRAME_CHUNK_BYTES), .length_bytes = FRAME_CHUNK_BYTES,
                                  .flags = chunk % CHUNKS == CHUNKS - 1 ? 0 : FRAME_FLAG_MORE};
    send_exactly(socket_fd, &header, sizeof(header));
    uint64_t words[CHUNK_WORDS];
    for (uint64_t word = 0; word < CHUNK_WORDS; word++)
        words[word] = word_of(chunk, word);
    if (!zero_chunk(chunk))
        send_exactly(socket_fd, words, sizeof(words));
}

/* The guest's word 1 of each page is its own mark. */
static void *touch_large(void *of)
{
    struct move *move = of;
    for (uint64_t page = 0; page < PAGES; page++) {
        volatile uint64_t *words = (volatile uint64_t *)(move->guest + page * LARGE_BYTES);
        CHECK(words[CHUNK_WORDS * 3 + 7] == word_of(page * CHUNKS + 3, 7));
        words[1] = ~page;
    }
    return NULL;
}

static void check_large(const struct move *move)
{
    for (uint64_t i = 0; i < PAGES * CHUNKS * CHUNK_WORDS; i++) {
        bool marked = i % (CHUNKS * CHUNK_WORDS) == 1;
        uint64_t expected = marked ? ~(i / (CHUNKS * CHUNK_WORDS)) : word_of(i / CHUNK_WORDS, i % CHUNK_WORDS);
        CHECK(((const uint64_t *)move->guest)[i] == expected);
    }
}

static void wait_requests(const struct move *move, uint64_t count_of_requests)
{
    struct destination_figures figures;
    do
        destination_read(move->destination, &figures);
    while (figures.requests_sent < count_of_requests);
}

static void loops_of_destination(struct move *move)
{
    pthread_create(&move->fault, NULL, run_fault, move);
    pthread_create(&move->receive, NULL, run_receive, move);
    destination_open(move->destination);
}

static void end_of_destination(struct move *move)
{
    destination_stop(move->destination);
    pthread_join(move->fault, NULL);
    pthread_join(move->receive, NULL);
}

struct sender {
    struct move *move;
    uint64_t seed; /* which order */
    pthread_t thread;
};

static void *send_by_bulk(void *of)
{
    struct sender *sender = of;
    uint64_t total = PAGES * CHUNKS;
    for (uint64_t i = 0; i < total; i++) /* 7 and 128 have no common divisor: each chunk once */
        send_piece(sender->move->bulk[1], (i * 7 + sender->seed) % total);
    return NULL;
}

/* All chunks come by bulk in a scattered order, and each page's once more by the urgent connection, backwards, when it has been asked for: at the
 * same time, so that both bring chunks of one page. Each page is touched as soon as it is here, and what comes late undoes nothing. */
static void scattered(void)
{
    struct move move;
    for (uint64_t seed = 0; seed < 4; seed++) {
        begin(&move);
        loops_of_destination(&move);
        pthread_t toucher;
        pthread_create(&toucher, NULL, touch_large, &move);
        wait_requests(&move, 1); /* page 0: it is asked for once */
        struct sender sender = {.move = &move, .seed = seed * 31};
        pthread_create(&sender.thread, NULL, send_by_bulk, &sender);
        for (uint64_t chunk = CHUNKS; chunk-- > 0;)
            send_piece(move.urgent[1], chunk);
        pthread_join(sender.thread, NULL);
        pthread_join(toucher, NULL);
        wait_final(&move);
        shutdown(move.bulk[1], SHUT_WR);
        shutdown(move.urgent[1], SHUT_WR);
        pthread_join(move.receive, NULL);
        pthread_join(move.fault, NULL);
        CHECK(move.receive_result.reason == LOOP_PEER_CLOSED && move.fault_result.reason == LOOP_PEER_CLOSED);
        check_large(&move);
        struct destination_figures figures;
        destination_read(move.destination, &figures);
        CHECK(figures.pages_final == PAGES && figures.pages_urgent + figures.pages_bulk == PAGES);
        CHECK(figures.pages_zero == 0 && figures.requests_outstanding == 0);
        struct loop_result result;
        destination_finish(move.destination, &result);
        CHECK(result.reason == LOOP_FINISHED);
        move_end(&move);
    }
}

/* A connection that ends in the middle of a page, and of a chunk: the page is not there, and nobody has seen a byte of it. */
static void cut(void)
{
    struct move move;
    begin(&move);
    pthread_create(&move.receive, NULL, run_receive, &move);
    for (uint64_t chunk = 0; chunk < CHUNKS - 1; chunk++)
        send_piece(move.bulk[1], chunk);
    struct frame_header header = {.magic = FRAME_MAGIC, .kind = FRAME_PAGES, .offset_bytes = LARGE_BYTES - FRAME_CHUNK_BYTES,
                                  .length_bytes = FRAME_CHUNK_BYTES};
    send_exactly(move.bulk[1], &header, sizeof(header));
    send_exactly(move.bulk[1], one_chunk, sizeof(one_chunk) / 2);
    shutdown(move.bulk[1], SHUT_WR);
    pthread_join(move.receive, NULL);
    CHECK(move.receive_result.reason == LOOP_PEER_CLOSED);
    struct loop_result result;
    destination_finish(move.destination, &result);
    CHECK(result.reason == LOOP_INCOMPLETE && result.page_index == 0 && result.got == PAGE_RECEIVING);
    struct destination_figures figures;
    destination_read(move.destination, &figures);
    CHECK(figures.pages_final == 0 && figures.pages_bulk == 0);
    move_end(&move);
}

static struct loop_result result_of_pieces(const struct frame_header *frames, size_t frame_count, bool urgent)
{
    struct move move;
    begin(&move);
    send_exactly(urgent ? move.urgent[1] : move.bulk[1], frames, frame_count * sizeof(*frames));
    struct loop_result *result = urgent ? &move.fault_result : &move.receive_result;
    if (urgent)
        fault_loop(move.destination, move.urgent[0], result);
    else
        receive_loop(move.destination, move.bulk[0], 0, false, result);
    move_end(&move);
    return *result;
}

static void bad_pieces(void)
{
    struct frame_header good = {.magic = FRAME_MAGIC, .kind = FRAME_ZERO, .page_index = 1, .offset_bytes = FRAME_CHUNK_BYTES,
                                .length_bytes = 2 * FRAME_CHUNK_BYTES, .flags = FRAME_FLAG_MORE};
    struct {
        enum frame_field field;
        struct frame_header frame;
    } bad[] = {{FRAME_FIELD_OFFSET, good}, {FRAME_FIELD_OFFSET, good}, {FRAME_FIELD_LENGTH, good}, {FRAME_FIELD_LENGTH, good},
               {FRAME_FIELD_FLAGS, good},  {FRAME_FIELD_FLAGS, good},  {FRAME_FIELD_FLAGS, good},  {FRAME_FIELD_LENGTH, good}};
    bad[0].frame.offset_bytes = LARGE_BYTES;
    bad[1].frame.offset_bytes = 4096;
    bad[2].frame.length_bytes = LARGE_BYTES; /* beyond its end */
    bad[3].frame.length_bytes = 4096;
    bad[4].frame.flags = 0; /* but it ends before its page */
    bad[5].frame.length_bytes = LARGE_BYTES - FRAME_CHUNK_BYTES; /* there is no more */
    bad[6].frame.offset_bytes = 0, bad[6].frame.length_bytes = LARGE_BYTES;
    bad[7].frame.length_bytes = 0;
    struct loop_result result;
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        result = result_of_pieces(&bad[i].frame, 1, false);
        CHECK(result.reason == LOOP_FRAME_INVALID && result.field == bad[i].field);
    }
    struct frame_header overlapping[2] = {good, good};
    overlapping[1].offset_bytes += FRAME_CHUNK_BYTES; /* its first chunk has come */
    result = result_of_pieces(overlapping, 2, false);
    CHECK(result.reason == LOOP_PAGE_DUPLICATE && result.page_index == 1);
    result = result_of_pieces(&good, 1, true);
    CHECK(result.reason == LOOP_PAGE_UNASKED && result.page_index == 1);
}

static void *read_page_0(void *of)
{
    struct move *move = of;
    for (uint64_t word = 0; word < LARGE_BYTES / 8; word++)
        CHECK(((volatile uint64_t *)move->guest)[word] == 0);
    return NULL;
}

static void wait_bulk_bytes(const struct move *move, uint64_t bytes)
{
    struct destination_figures figures;
    do
        destination_read(move->destination, &figures);
    while (figures.bytes_bulk < bytes);
}

/* A page half of which is here is removed at once, although a thread waits for it and has asked; the other half comes late, by both. */
static void discards(void)
{
    struct move move;
    struct loop_result result;
    struct destination_figures figures;
    begin(&move);
    loops_of_destination(&move);
    uint64_t sent_bytes = 0;
    for (uint64_t chunk = 1; chunk < CHUNKS / 2; chunk++) {
        send_piece(move.bulk[1], chunk);
        sent_bytes += FRAME_HEADER_BYTES + (zero_chunk(chunk) ? 0 : FRAME_CHUNK_BYTES);
    }
    wait_bulk_bytes(&move, sent_bytes);
    pthread_t reader;
    pthread_create(&reader, NULL, read_page_0, &move);
    wait_requests(&move, 1);
    destination_discard(move.destination, 0, 0, 1, &result);
    CHECK(result.reason == LOOP_FINISHED);
    pthread_join(reader, NULL);
    for (uint64_t chunk = CHUNKS / 2; chunk < CHUNKS; chunk++) {
        send_piece(move.bulk[1], chunk);
        send_piece(move.urgent[1], chunk);
    }
    for (uint64_t chunk = CHUNKS; chunk < 2 * CHUNKS; chunk++) /* behind them on one connection: page 1 */
        send_piece(move.bulk[1], chunk);
    wait_pages_final(&move, 2);
    read_page_0(&move);
    destination_discard(move.destination, 0, 1, 2, &result); /* one that is here, one of which nothing is */
    CHECK(result.reason == LOOP_FINISHED);
    for (uint64_t word = 0; word < 2 * LARGE_BYTES / 8; word++)
        CHECK(((volatile uint64_t *)(move.guest + LARGE_BYTES))[word] == 0);
    end_of_destination(&move);
    CHECK(move.fault_result.reason == LOOP_STOPPED && move.receive_result.reason == LOOP_STOPPED);
    destination_read(move.destination, &figures);
    CHECK(figures.pages_final == 3 && figures.pages_removed == 2 && figures.pages_bulk == 1 && figures.requests_outstanding == 0);
    move_end(&move);
}

/* At the source: a page of 4 KiB that is asked for while a large one goes out does not wait for its end. */
static void between(void)
{
    struct move move;
    begin(&move);
    uint64_t content = 4711;
    int small_fd = memfd_create("small", MFD_CLOEXEC);
    CHECK(small_fd >= 0 && ftruncate(small_fd, 4096) == 0 && pwrite(small_fd, &content, sizeof(content), 0) == sizeof(content));
    source_destroy(move.source);
    struct memory_region regions[2] = {{.size_bytes = 4096, .page_bytes = 4096, .memory_fd = small_fd},
                                       {.size_bytes = PAGES * LARGE_BYTES, .page_bytes = LARGE_BYTES, .memory_fd = move.source_fd}};
    int error_number = 0;
    move.source = source_create(regions, 2, &error_number);
    CHECK(move.source);
    struct frame_header requests[2] = {{.magic = FRAME_MAGIC, .kind = FRAME_REQUEST, .region = 1, .length_bytes = LARGE_BYTES},
                                       {.magic = FRAME_MAGIC, .kind = FRAME_REQUEST, .length_bytes = 4096}};
    send_exactly(move.urgent[0], &requests[0], sizeof(requests[0]));
    source_open(move.source);
    pthread_create(&move.serve, NULL, run_serve, &move);
    uint64_t large_bytes = 0, before_bytes = LARGE_BYTES;
    while (large_bytes < LARGE_BYTES) { /* the socket holds a piece or two: the second request comes while the answer waits for room */
        struct frame_header answer;
        CHECK(recv(move.urgent[0], &answer, sizeof(answer), MSG_WAITALL) == sizeof(answer) && answer.kind == FRAME_PAGES);
        CHECK(answer.length_bytes <= sizeof(one_chunk));
        CHECK(recv(move.urgent[0], one_chunk, answer.length_bytes, MSG_WAITALL) == (ssize_t)answer.length_bytes);
        if (answer.region == 0) {
            CHECK(*(uint64_t *)one_chunk == content);
            before_bytes = large_bytes;
            continue;
        }
        CHECK(answer.offset_bytes == large_bytes && *(uint64_t *)one_chunk == stamp(0));
        if (large_bytes == 0)
            send_exactly(move.urgent[0], &requests[1], sizeof(requests[1]));
        large_bytes += answer.length_bytes;
    }
    CHECK(before_bytes <= LARGE_BYTES / 2);
    source_stop(move.source);
    pthread_join(move.serve, NULL);
    struct source_figures figures;
    source_read(move.source, &figures);
    CHECK(figures.requests == 2 && figures.pages_urgent == 2 && figures.pages_sent == 2);
    close(small_fd);
    move_end(&move);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } scenarios[] = {{"scattered", scattered}, {"cut", cut}, {"bad-pieces", bad_pieces}, {"discards", discards}, {"between", between}};
    alarm(100);
    for (int i = 1; i < argc; i++) {
        size_t which = 0;
        while (which < sizeof(scenarios) / sizeof(scenarios[0]) && strcmp(argv[i], scenarios[which].name) != 0)
            which++;
        if (which == sizeof(scenarios) / sizeof(scenarios[0])) {
            fprintf(stderr, "usage: chunks-main scattered|cut|bad-pieces|discards|between ...\n");
            return 2;
        }
        scenarios[which].run();
        printf("%s: held\n", argv[i]);
    }
    return 0;
}
