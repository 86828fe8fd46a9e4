/* Discards alone: discard-main SEED COUNT [STEP]. COUNT moves, of SEED, SEED + STEP, ...: in turn with REMOVE events, with messages, and with MADV_DONTNEED, which keeps
 * the data; three without and three with precopy. The guest's threads at the destination discard, write and read their pages at random
 * while these arrive, and beyond the end of the migration: what was discarded reads zero, what was not as it was. On top of the
 * main that precopies. */
#define MAIN_OF_DISCARDS
#include "precopy_main.c"

#define GUEST_THREADS 2
#define AHEAD_PAGES 256

enum { BY_MESSAGE, BY_EVENT, KEEPING, WAYS };

struct guest_thread {
    struct guest *guest;
    uint64_t index, random, discards;
    pthread_t thread;
};

/* The guest at the destination. */
struct guest {
    struct move *move;
    uint64_t (*content)[2]; /* of each page: its first word, its last */
    _Atomic bool end;
    struct guest_thread threads[GUEST_THREADS];
};

static void check_page(const struct guest *guest, uint64_t page)
{
    const struct move *move = guest->move;
    const volatile uint64_t *words = (const volatile uint64_t *)(move->guest + page * move->page_bytes);
    uint64_t last = move->page_bytes / 8 - 1, between = 0;
    CHECK(words[0] == guest->content[page][0] && words[last] == guest->content[page][1]);
    for (uint64_t i = 1; i < last && guest->content[page][0] == 0; i++)
        between |= words[i];
    CHECK(between == 0);
}

static void discard_page(const struct guest *guest, uint64_t page)
{
    struct move *move = guest->move;
    int advice = move->removed_keeps ? MADV_DONTNEED : MADV_REMOVE;
    CHECK(madvise(move->guest + page * move->page_bytes, move->page_bytes, advice) == 0);
    if (move->removed_keeps)
        return;
    if (!move->remove_events) {
        struct loop_result result;
        destination_discard(move->destination, 0, page, 1, &result);
        finished(&result);
    }
    guest->content[page][0] = guest->content[page][1] = 0;
}

static void write_page(const struct guest *guest, uint64_t page, uint64_t content)
{
    const struct move *move = guest->move;
    volatile uint64_t *words = (volatile uint64_t *)(move->guest + page * move->page_bytes);
    words[0] = words[move->page_bytes / 8 - 1] = guest->content[page][0] = guest->content[page][1] = content;
}

/* While pages stream in, in order: discards of those that are next, each looked at behind it. Nothing else is touched, since bulk
 * would go on behind a fault. */
static void chase_bulk(struct guest_thread *thread)
{
    struct guest *guest = thread->guest;
    struct destination_figures figures;
    while (!atomic_load(&guest->end)) {
        destination_read(guest->move->destination, &figures);
        uint64_t come = figures.pages_bulk + figures.pages_zero + figures.pages_dropped;
        uint64_t page = (come + next_random(&thread->random) % AHEAD_PAGES) / GUEST_THREADS * GUEST_THREADS + thread->index;
        if (page >= guest->move->page_count)
            return;
        discard_page(guest, page);
        thread->discards++;
        check_page(guest, page);
    }
}

/* Discards come blindly: most pages are not here yet. A page that was discarded is looked at, at once or later. */
static void *run_guest(void *of)
{
    struct guest_thread *thread = of;
    struct guest *guest = thread->guest;
    uint64_t pages = guest->move->page_count / GUEST_THREADS;
    if (guest->move->with_bulk)
        chase_bulk(thread);
    for (uint64_t step = 0; step < pages || !atomic_load(&guest->end); step++) {
        uint64_t random = next_random(&thread->random), page = random / 16 % pages * GUEST_THREADS + thread->index;
        if (random >> 62 != 0) {
            discard_page(guest, page);
            thread->discards++;
        }
        if (random >> 62 == 1)
            check_page(guest, page);
        if (random >> 61 == 0) {
            check_page(guest, page);
            write_page(guest, page, random | 1);
        }
    }
    for (uint64_t page = thread->index; page < guest->move->page_count; page += GUEST_THREADS)
        check_page(guest, page);
    return NULL;
}

static void guest_begin(struct guest *guest, struct move *move, uint64_t seed)
{
    *guest = (struct guest){.move = move, .content = calloc(move->page_count, sizeof(*guest->content))};
    for (uint64_t page = 0; page < move->page_count; page++) {
        off_t start = (off_t)(page * move->page_bytes), last = start + (off_t)move->page_bytes - 8;
        CHECK(pread(move->source_fd, &guest->content[page][0], 8, start) == 8);
        CHECK(pread(move->source_fd, &guest->content[page][1], 8, last) == 8);
    }
    for (uint64_t i = 0; i < GUEST_THREADS; i++) {
        guest->threads[i] = (struct guest_thread){.guest = guest, .index = i, .random = seed * 7919 + i};
        pthread_create(&guest->threads[i].thread, NULL, run_guest, &guest->threads[i]);
    }
}

/* Until all is here and unregistered, while the guest goes on; then the guest ends. Added to removed[]: pages discarded on the way,
 * by messages and by events, and by what keeps them. */
static void until_whole(struct guest *guest, uint64_t *removed)
{
    struct move *move = guest->move;
    struct loop_result result;
    wait_final(move);
    loops_end(move);
    CHECK(move->fault_result.reason == LOOP_STOPPED && move->receive_result.reason == LOOP_STOPPED);
    destination_finish(move->destination, &result);
    finished(&result);
    CHECK(close(move->userfaultfd) == 0); /* as daemon and agent do: a discard whose event nobody will read goes on */
    move->userfaultfd = -1;
    atomic_store(&guest->end, true);
    uint64_t discards = 0;
    for (uint64_t i = 0; i < GUEST_THREADS; i++) {
        pthread_join(guest->threads[i].thread, NULL);
        discards += guest->threads[i].discards;
    }
    struct destination_figures figures;
    destination_read(move->destination, &figures);
    uint64_t came = figures.pages_urgent + figures.pages_readahead + figures.pages_bulk;
    CHECK(came + figures.pages_zero + figures.pages_kept + figures.pages_removed == move->page_count);
    CHECK(figures.pages_final == move->page_count && figures.pages_removed <= discards);
    CHECK(figures.removes <= (move->remove_events ? discards : 0));
    free(guest->content);
    removed[move->removed_keeps ? KEEPING : move->remove_events] += figures.pages_removed;
}

static void discards_alone(struct move *move, uint64_t seed, uint64_t *removed)
{
    struct guest guest;
    move->with_bulk = true;
    move_begin(move);
    loops_begin(move);
    guest_begin(&guest, move, seed);
    until_whole(&guest, removed);
    move_end(move);
}

static void discards_after_precopy(struct tracked *tracked, uint64_t seed, uint64_t *removed)
{
    struct move *move = &tracked->move;
    uint64_t random = seed * UINT64_C(0x9e3779b97f4a7c15) | 1;
    struct guest guest;
    tracked_begin(tracked, seed);
    pthread_create(&move->fault, NULL, run_fault, move);
    pthread_create(&move->receive, NULL, run_receive_precopy, move);
    rounds_sent(tracked, &random);
    pthread_create(&move->serve, NULL, run_serve, move);
    pthread_create(&move->stream, NULL, run_stream, move);
    paused(tracked, &random);
    guest_begin(&guest, move, seed);
    source_open(move->source);
    destination_open(move->destination);
    source_open_bulk(move->source);
    until_whole(&guest, removed);
    munmap(tracked->memory, move->page_count * move->page_bytes);
    close(tracked->userfaultfd);
    close(tracked->pagemap_fd);
    move_end(move);
}

int main(int argc, char **argv)
{
    alarm(100);
    if (argc < 3) {
        fprintf(stderr, "usage: discard-main SEED COUNT [STEP]\n");
        return 2;
    }
    uint64_t seed = strtoull(argv[1], NULL, 10), count = strtoull(argv[2], NULL, 10), step = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
    uint64_t removed[WAYS] = {0};
    for (uint64_t i = 0; i < count; i++, seed += step) {
        struct tracked tracked = {.move = {.page_count = 4096, .page_bytes = 4096, .remove_events = seed % 3 != 1, .removed_keeps = seed % 3 == 2}};
        if (seed / 3 % 2 == 0)
            discards_alone(&tracked.move, seed, removed);
        else
            discards_after_precopy(&tracked, seed, removed);
    }
    CHECK(removed[KEEPING] == 0 && (step > 1 || (removed[BY_MESSAGE] > 0 && removed[BY_EVENT] > 0)));
    printf("discards: held\n");
    return 0;
}
