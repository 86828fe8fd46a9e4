/* A destination taken back, alone: restore-main SEED COUNT [hugetlb]. COUNT moves begin from page states of an earlier life whose every byte is
 * random, in a file that ends early every third time, with torn pages in the guest's file and a thread whose fault event was read and lost. What was final is
 * as it was, all else comes from the source, whose own earlier life is forgotten too; counters are derived; nobody else may write the
 * states or own them. On top of the data plane's own test main. */
int main_of_the_data_plane(int argc, char **argv);
#define main main_of_the_data_plane
#include "dataplane_main.c"
#undef main

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/wait.h>

struct earlier {
    struct move move;
    uint8_t *byte;
    uint64_t *content; /* of each page: what every word of it has to be */
    uint64_t finals, random;
    int states_fd;
};

static uint64_t next_random(uint64_t *state)
{
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static bool was_discarded(uint8_t byte)
{
    return PAGE_STATE(byte) == PAGE_REMOVED || (PAGE_STATE(byte) == PAGE_RECEIVING && byte & PAGE_DISCARDED);
}

/* The guest's file as a daemon leaves it that dies with these states. */
static void leave_page(struct earlier *earlier, uint64_t page, uint64_t *words)
{
    uint8_t byte = earlier->byte[page], state = PAGE_STATE(byte);
    bool here = state == PAGE_PRESENT || state == PAGE_MAPPED, none = state == PAGE_ZERO || state == PAGE_REMOVED;
    uint64_t fill = here ? stamp(page) : none ? 0 : ~stamp(page + 1); /* torn: half of it is something else */
    earlier->content[page] = none || was_discarded(byte) ? 0 : stamp(page);
    earlier->finals += here || none || was_discarded(byte);
    for (uint64_t word = 0; fill != 0 && word < earlier->move.page_bytes / (here ? 8 : 16); word++)
        words[word] = fill;
}

static void leave_all(struct earlier *earlier, uint64_t kept)
{
    struct move *move = &earlier->move;
    char *memory = mmap(NULL, move->page_count * move->page_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, move->destination_fd, 0);
    CHECK(memory != MAP_FAILED);
    earlier->states_fd = memfd_create("earlier", MFD_CLOEXEC);
    for (uint64_t page = 0; page < move->page_count; page++) {
        earlier->byte[page] = page < kept && page > 0 ? (uint8_t)next_random(&earlier->random) : PAGE_ABSENT;
        leave_page(earlier, page, (uint64_t *)(memory + page * move->page_bytes));
    }
    CHECK(pwrite(earlier->states_fd, earlier->byte, kept, 0) == (ssize_t)kept);
    munmap(memory, move->page_count * move->page_bytes);
}

static void *run_early_toucher(void *of)
{
    struct earlier *earlier = of;
    CHECK(*(volatile uint64_t *)earlier->move.guest == stamp(0));
    return NULL;
}

static void lose_an_event(const struct move *move)
{
    struct pollfd polled = {.fd = move->userfaultfd, .events = POLLIN};
    struct uffd_msg message;
    CHECK(poll(&polled, 1, 10000) == 1);
    CHECK(read(move->userfaultfd, &message, sizeof(message)) == sizeof(message) && message.event == UFFD_EVENT_PAGEFAULT);
}

/* Only the daemon's own mapping can write, and only one process is the owner. */
static void check_guarded(struct destination *destination)
{
    int fd = destination_states_fd(destination), status;
    CHECK(fcntl(fd, F_GET_SEALS) == (F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL));
    CHECK(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EPERM);
    CHECK(pwrite(fd, "", 1, 0) == -1 && errno == EPERM && ftruncate(fd, 0) == -1 && errno == EPERM);
    pid_t child = fork();
    if (child == 0) {
        int owner;
        _exit(states_lock(fd, &owner) == EAGAIN && owner == getppid() ? 0 : 1);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

static void check_restored(const struct earlier *earlier)
{
    struct destination_figures figures;
    destination_read(earlier->move.destination, &figures);
    CHECK(figures.pages_final == earlier->finals && figures.pages_restored == earlier->finals);
}

static void *run_checker(void *of)
{
    struct earlier *earlier = of;
    const struct move *move = &earlier->move;
    for (uint64_t i = 0; i < move->page_count; i++) {
        uint64_t page = i * 7919 % move->page_count, end = move->page_bytes / 8;
        const volatile uint64_t *words = (const volatile uint64_t *)(move->guest + page * move->page_bytes);
        for (uint64_t word = 0; word < end; word += word % 512 == 511 || end == 512 ? 1 : 511)
            CHECK(words[word] == earlier->content[page]);
    }
    return NULL;
}

static void take_back(struct earlier *earlier)
{
    struct move *move = &earlier->move;
    struct loop_result result;
    destination_restore(move->destination, earlier->states_fd, &result);
    CHECK(result.reason == LOOP_FINISHED);
    check_restored(earlier);
    check_guarded(move->destination);
    destination_wake(move->destination);
    bool settled = destination_is_settled(move->destination);
    destination_next_epoch(move->destination);
    source_restarted(move->source);
    source_next_epoch(move->source, settled);
}

static void one(uint64_t seed, bool hugetlb)
{
    struct earlier earlier = {.random = seed * 2 + 1, .move = {.page_count = 4096, .page_bytes = 4096, .with_bulk = true}};
    struct move *move = &earlier.move;
    if (hugetlb)
        *move = (struct move){.page_count = 14, .page_bytes = 2u << 20, .with_bulk = true, .hugetlb = true};
    earlier.byte = calloc(move->page_count, 1);
    earlier.content = calloc(move->page_count, sizeof(*earlier.content));
    move->others = seed % 2;
    for (int i = 0; i < 10; i++)
        next_random(&earlier.random);
    move_begin(move);
    leave_all(&earlier, seed % 3 == 2 ? move->page_count / 2 + 1 : move->page_count);
    pthread_t early, checkers[TOUCHERS];
    pthread_create(&early, NULL, run_early_toucher, &earlier);
    lose_an_event(move);
    take_back(&earlier);
    loops_begin(move);
    for (int i = 0; i < TOUCHERS; i++)
        pthread_create(&checkers[i], NULL, run_checker, &earlier);
    for (int i = 0; i < TOUCHERS; i++)
        pthread_join(checkers[i], NULL);
    pthread_join(early, NULL);
    wait_final(move);
    loops_end(move);
    struct loop_result finished;
    destination_finish(move->destination, &finished);
    CHECK(finished.reason == LOOP_FINISHED);
    run_checker(&earlier);
    close(earlier.states_fd);
    free(earlier.byte);
    free(earlier.content);
    move_end(move);
}

int main(int argc, char **argv)
{
    if (argc < 3 || argc > 4) {
        fprintf(stderr, "usage: restore-main SEED COUNT [hugetlb]\n");
        return 2;
    }
    alarm(110);
    uint64_t seed = strtoull(argv[1], NULL, 10), count = strtoull(argv[2], NULL, 10);
    for (uint64_t i = 0; i < count; i++)
        one(seed + i, argc == 4);
    printf("restore: held\n");
    return 0;
}
