/* Precopy alone: precopy-main SEED COUNT [hugetlb]. COUNT moves, by one, two and three bulk connections in turn, each of a guest of its own whose threads write flat out at the source while
 * rounds are sent, until they are paused at a random moment; then every page is touched at the destination while the stale set
 * is on its way, and must be what the source holds. On top of the data plane's own test main.
 *   precopy-main order       which connection brings a page: the same one in every round */
int main_of_the_data_plane(int argc, char **argv);
#define main main_of_the_data_plane
#include "dataplane_main.c"
#undef main

#include <fcntl.h>
#include <time.h>

#define WRITERS 2
#define ROUNDS_MAX 4

struct writer {
    struct tracked *tracked;
    uint64_t index, seed;
    pthread_t thread;
};

/* The guest at the source: its mapping, what tells its writes, and the threads that write. */
struct tracked {
    struct move move;
    char *memory;
    int userfaultfd, pagemap_fd;
    _Atomic bool paused;
    struct writer writers[WRITERS];
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void discard(struct move *move, uint64_t page, void *words)
{
    CHECK(madvise(words, move->page_bytes, MADV_REMOVE) == 0);
    source_discarded(move->source, 0, page, 1);
}

/* Each its own pages: some are written all the time, the others now and then; one write in eight leaves a page of zeroes, and one
 * is a discard, which leaves a hole and which no scan finds. */
static void *run_writer(void *of)
{
    struct writer *writer = of;
    struct move *move = &writer->tracked->move;
    while (!atomic_load_explicit(&writer->tracked->paused, memory_order_relaxed)) {
        uint64_t random = next_random(&writer->seed);
        uint64_t range = (random % 16 ? move->page_count / 8 + WRITERS : move->page_count) / WRITERS;
        uint64_t page = random / 16 % range * WRITERS + writer->index;
        uint64_t *words = (uint64_t *)(writer->tracked->memory + page * move->page_bytes);
        if (random >> 61 == 0)
            memset(words, 0, move->page_bytes);
        else if (random >> 61 == 1 && !move->hugetlb)
            discard(move, page, words);
        else
            words[0] = words[move->page_bytes / 8 - 1] = random | 1;
    }
    return NULL;
}

static void tracked_begin(struct tracked *tracked, uint64_t seed)
{
    struct move *move = &tracked->move;
    size_t size_bytes = move->page_count * move->page_bytes;
    move_begin(move);
    tracked->memory = mapping_reserve(size_bytes);
    CHECK(tracked->memory && mapping_place(tracked->memory, size_bytes, move->source_fd, 0) == 0);
    struct uffd_opened opened;
    uffd_open(1, &opened);
    CHECK(opened.fd >= 0);
    tracked->userfaultfd = opened.fd;
    uint64_t features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM, ioctls;
    CHECK(uffd_api(tracked->userfaultfd, &features) == 0);
    CHECK(uffd_register(tracked->userfaultfd, (uint64_t)(uintptr_t)tracked->memory, size_bytes, UFFDIO_REGISTER_MODE_WP, &ioctls) == 0);
    tracked->pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    CHECK(tracked->pagemap_fd >= 0);
    source_destroy(move->source); /* once more, with the addresses of the guest at the source */
    struct memory_region region = {.guest_address = (uint64_t)(uintptr_t)tracked->memory, .size_bytes = size_bytes,
                                   .page_bytes = (uint32_t)move->page_bytes, .memory_fd = move->source_fd};
    int error_number = 0;
    move->source = source_create(&region, 1, &error_number);
    CHECK(move->source && source_track(move->source, tracked->pagemap_fd) == 0);
    source_streams(move->source, 1 + move->others);
    for (uint64_t i = 0; i < WRITERS; i++) {
        tracked->writers[i] = (struct writer){.tracked = tracked, .index = i, .seed = seed * 2 + i + 1};
        pthread_create(&tracked->writers[i].thread, NULL, run_writer, &tracked->writers[i]);
    }
}

static void tracked_end(struct tracked *tracked)
{
    munmap(tracked->memory, tracked->move.page_count * tracked->move.page_bytes);
    close(tracked->userfaultfd);
    close(tracked->pagemap_fd);
    move_end(&tracked->move);
}

static void finished(const struct loop_result *result)
{
    if (result->reason != LOOP_FINISHED)
        fprintf(stderr, "%s: reason %d, errno %d\n", result->where, result->reason, result->error_number);
    CHECK(result->reason == LOOP_FINISHED);
}

static void *run_receive_precopy(void *of)
{
    struct move *move = of;
    receive_loop(move->destination, move->bulk[0], 0, true, &move->receive_result);
    return NULL;
}

static void *run_another_receive_precopy(void *of)
{
    struct another *another = of;
    receive_loop(another->move->destination, another->bulk[0], another->stream, true, &another->receive_result);
    return NULL;
}

static void *run_another_send(void *of)
{
    struct another *another = of;
    precopy_send(another->move->source, another->bulk[1], another->stream, &another->step_result);
    return NULL;
}

/* A round, by all connections at once. */
static void round_sent(struct move *move)
{
    struct loop_result result;
    for (uint32_t i = 0; i < move->others; i++)
        pthread_create(&move->other[i].step, NULL, run_another_send, &move->other[i]);
    precopy_send(move->source, move->bulk[1], 0, &result);
    finished(&result);
    for (uint32_t i = 0; i < move->others; i++) {
        pthread_join(move->other[i].step, NULL);
        finished(&move->other[i].step_result);
    }
}

/* The marks of all connections have come: no precopied page is in flight any more. */
static void quiesced(struct move *move)
{
    struct loop_result result;
    precopy_end(move->source, move->bulk[1], &result);
    finished(&result);
    for (uint32_t i = 0; i < move->others; i++) {
        precopy_end(move->source, move->other[i].bulk[1], &result);
        finished(&result);
    }
    CHECK(wait_ready(destination_marked_fd(move->destination), 1 /* POLLIN */, -1, &result));
    struct source_figures sent;
    struct destination_figures here;
    source_read(move->source, &sent);
    destination_read(move->destination, &here);
    CHECK(here.pages_precopy == sent.pages_precopy + sent.pages_zero_precopy && here.pages_dropped == 0);
}

static void rounds_sent(struct tracked *tracked, uint64_t *seed)
{
    struct move *move = &tracked->move;
    struct loop_result result;
    others_begin(move, run_another_receive_precopy);
    precopy_arm(move->source, &result);
    finished(&result);
    for (uint64_t round = next_random(seed) % ROUNDS_MAX;; round--) {
        round_sent(move);
        precopy_count(move->source, &result);
        finished(&result);
        if (round == 0)
            break;
        precopy_collect(move->source, &result);
        finished(&result);
    }
    quiesced(move);
}

static void writers_end(struct tracked *tracked)
{
    atomic_store(&tracked->paused, true);
    for (int i = 0; i < WRITERS; i++)
        pthread_join(tracked->writers[i].thread, NULL);
}

static void paused(struct tracked *tracked, uint64_t *seed)
{
    struct timespec moment = {.tv_nsec = (long)(next_random(seed) % 2000000)};
    nanosleep(&moment, NULL); /* at a random moment: nothing is waited for */
    writers_end(tracked);
}

#ifndef MAIN_OF_DISCARDS /* discard_main.c has moves of its own */
/* All pages of this toucher's half, while the stale set is on its way: as the source left them, then marked. */
static void *run_comparing(void *of)
{
    struct toucher *toucher = of;
    struct tracked *tracked = (struct tracked *)toucher->move;
    struct move *move = toucher->move;
    uint64_t half = move->page_count / TOUCHERS;
    for (uint64_t i = 0; i < half; i++) {
        uint64_t page = (i * 7919 + toucher->seed) % half * TOUCHERS + toucher->seed;
        volatile uint64_t *words = (volatile uint64_t *)(move->guest + page * move->page_bytes);
        const uint64_t *truth = (const uint64_t *)(tracked->memory + page * move->page_bytes);
        CHECK(words[0] == truth[0]);
        words[1] = ~page;
        CHECK(words[move->page_bytes / 8 - 1] == truth[move->page_bytes / 8 - 1]);
    }
    return NULL;
}

static void same_but_for_the_marks(const struct tracked *tracked)
{
    const struct move *move = &tracked->move;
    for (uint64_t page = 0; page < move->page_count; page++) {
        const uint64_t *words = (const uint64_t *)(move->guest + page * move->page_bytes);
        const uint64_t *truth = (const uint64_t *)(tracked->memory + page * move->page_bytes);
        CHECK(words[0] == truth[0] && words[1] == ~page);
        CHECK(memcmp(words + 2, truth + 2, move->page_bytes - 16) == 0);
    }
}

static void figures_add_up(const struct move *move)
{
    struct destination_figures figures;
    struct source_figures sent;
    destination_read(move->destination, &figures);
    source_read(move->source, &sent);
    uint64_t shared = move->hugetlb ? figures.faults_held : 0; /* large pages asked for while held: bulk may send the rest of an answer */
    CHECK(sent.pages_bulk + sent.pages_zero_bulk <= figures.pages_stale + shared); /* nothing but what was lacking */
    uint64_t came = figures.pages_urgent + figures.pages_readahead + figures.pages_bulk;
    CHECK(came + figures.pages_zero + figures.pages_kept == move->page_count);
    CHECK(figures.pages_final == move->page_count && figures.pages_held == move->page_count);
    CHECK(figures.settled_ns > 0 || figures.pages_kept + figures.pages_bulk == 0); /* 0: every page was touched before that */
    CHECK(figures.pages_stale <= move->page_count);
}

static void precopied_move(struct tracked *tracked, uint64_t seed)
{
    struct move *move = &tracked->move;
    uint64_t random = seed * UINT64_C(0x9e3779b97f4a7c15) | 1;
    tracked_begin(tracked, seed);
    pthread_create(&move->fault, NULL, run_fault, move);
    pthread_create(&move->receive, NULL, run_receive_precopy, move);
    rounds_sent(tracked, &random);
    pthread_create(&move->serve, NULL, run_serve, move);
    pthread_create(&move->stream, NULL, run_stream, move);
    others_stream(move);
    paused(tracked, &random);
    source_open(move->source);
    destination_open(move->destination);
    source_open_bulk(move->source);
    struct toucher touchers[TOUCHERS];
    for (uint64_t i = 0; i < TOUCHERS; i++) {
        touchers[i] = (struct toucher){.move = move, .seed = i};
        pthread_create(&touchers[i].thread, NULL, run_comparing, &touchers[i]);
    }
    for (uint64_t i = 0; i < TOUCHERS; i++)
        pthread_join(touchers[i].thread, NULL);
    wait_final(move);
    loops_end(move);
    struct loop_result result;
    destination_finish(move->destination, &result);
    finished(&result);
    CHECK(move->fault_result.reason == LOOP_STOPPED && move->receive_result.reason == LOOP_STOPPED);
    same_but_for_the_marks(tracked);
    figures_add_up(move);
    tracked_end(tracked);
}

/* A precopy that comes to nothing leaves nothing behind in the waiting memory. */
static void cleaned(struct tracked *tracked, uint64_t seed)
{
    struct move *move = &tracked->move;
    uint64_t random = seed | 1;
    tracked_begin(tracked, seed);
    pthread_create(&move->receive, NULL, run_receive_precopy, move);
    rounds_sent(tracked, &random);
    paused(tracked, &random);
    destination_stop(move->destination);
    pthread_join(move->receive, NULL);
    for (uint32_t i = 0; i < move->others; i++)
        pthread_join(move->other[i].receive, NULL);
    struct loop_result result;
    destination_clean(move->destination, &result);
    finished(&result);
    char *page = malloc(move->page_bytes);
    for (uint64_t i = 0; i < move->page_count; i++) {
        CHECK(pread(move->destination_fd, page, move->page_bytes, (off_t)(i * move->page_bytes)) == (ssize_t)move->page_bytes);
        CHECK(page[0] == 0 && memcmp(page, page + 1, move->page_bytes - 1) == 0);
    }
    free(page);
    tracked_end(tracked);
}

/* The frames that wait in a connection, nobody else reading them: each page's first copy says which connection is its own. */
static void note_connection(const struct move *move, int socket, uint32_t stream, uint8_t *connection_of)
{
    struct frame_header frame;
    char *page = malloc(move->page_bytes);
    while (recv(socket, &frame, sizeof(frame), MSG_DONTWAIT) == sizeof(frame)) {
        uint64_t page_count = frame.length_bytes / move->page_bytes;
        for (uint64_t i = frame.page_index; i < frame.page_index + page_count; i++) {
            if (connection_of[i] == 0)
                connection_of[i] = (uint8_t)(1 + stream);
            CHECK(connection_of[i] == 1 + stream);
            CHECK(frame.kind == FRAME_ZERO || recv(socket, page, move->page_bytes, MSG_WAITALL) == (ssize_t)move->page_bytes);
        }
    }
    free(page);
}

static void in_order(struct tracked *tracked)
{
    struct move *move = &tracked->move;
    uint8_t *connection_of = calloc(move->page_count, 1);
    struct loop_result result;
    tracked_begin(tracked, 1);
    writers_end(tracked); /* nobody writes but this thread */
    CHECK(madvise(tracked->memory, move->page_count * move->page_bytes, MADV_REMOVE) == 0); /* so that a round fits into the sockets */
    precopy_arm(move->source, &result);
    for (uint64_t round = 0; round < ROUNDS_MAX; round++) {
        finished(&result);
        for (uint32_t stream = 0; stream <= move->others; stream++) {
            int *bulk = stream == 0 ? move->bulk : move->other[stream - 1].bulk;
            precopy_send(move->source, bulk[1], stream, &result);
            finished(&result);
            note_connection(move, bulk[0], stream, connection_of);
        }
        for (uint64_t page = round; page < move->page_count; page += 97)
            tracked->memory[page * move->page_bytes] = 1;
        precopy_collect(move->source, &result);
    }
    for (uint64_t page = 0, pages_of[STREAMS_MAX] = {0}; page < move->page_count; page++) {
        CHECK(connection_of[page] != 0);
        pages_of[connection_of[page] - 1]++;
        CHECK(page + 1 < move->page_count || (pages_of[0] > 0 && pages_of[1] > 0 && pages_of[2] > 0)); /* all have their share */
    }
    free(connection_of);
    tracked_end(tracked);
}

int main(int argc, char **argv)
{
    alarm(100);
    if (argc == 2 && strcmp(argv[1], "order") == 0) {
        in_order(&(struct tracked){.move = {.page_count = 2048, .page_bytes = 4096, .others = 2}});
        printf("order: held\n");
        return 0;
    }
    if (argc < 3) {
        fprintf(stderr, "usage: precopy-main SEED COUNT [hugetlb] | order\n");
        return 2;
    }
    bool hugetlb = argc > 3 && strcmp(argv[3], "hugetlb") == 0;
    uint64_t seed = strtoull(argv[1], NULL, 10), last = seed + strtoull(argv[2], NULL, 10);
    struct move small = {.page_count = 2048, .page_bytes = 4096}, huge = {.page_count = 8, .page_bytes = 2u << 20, .hugetlb = true};
    for (; seed <= last; seed++) {
        struct tracked tracked = {.move = hugetlb ? huge : small};
        tracked.move.others = (uint32_t)(seed % 3);
        if (seed == last)
            cleaned(&tracked, seed);
        else
            precopied_move(&tracked, seed);
    }
    printf("precopy: held\n");
    return 0;
}
#endif
