/* Two guards that only a C scenario can show at will: guards NAME, on top of the data plane's own test main.
 *   gate          P2: a request that came before the guest was paused is answered with what the page holds afterwards
 *   early-finish  P3: finishing before every page is here leaves a waiting thread waiting, and it reads what was sent */
#define main main_of_the_data_plane
#include "../path/dataplane_main.c"
#undef main

#include <sys/syscall.h>

#define NEW_CONTENT UINT64_C(0x6e6577)

static _Atomic int serve_tid;

static void *run_serve_by_name(void *of)
{
    atomic_store(&serve_tid, (int)syscall(SYS_gettid));
    return run_serve(of);
}

/* Until the thread has done all that it can do for now. */
static void until_asleep(int tid)
{
    char path[64], line[256];
    snprintf(path, sizeof(path), "/proc/self/task/%d/stat", tid);
    for (;;) {
        FILE *file = fopen(path, "re");
        CHECK(file && fgets(line, sizeof(line), file));
        fclose(file);
        if (strrchr(line, ')')[2] == 'S')
            return;
        sched_yield();
    }
}

static void gate(struct move *move)
{
    move_begin(move);
    struct frame_header request = {.magic = FRAME_MAGIC, .kind = FRAME_REQUEST, .page_index = 1, .length_bytes = (uint32_t)move->page_bytes};
    send_exactly(move->urgent[0], &request, sizeof(request));
    CHECK(pthread_create(&move->serve, NULL, run_serve_by_name, move) == 0);
    while (atomic_load(&serve_tid) == 0)
        sched_yield();
    until_asleep(atomic_load(&serve_tid));
    uint64_t content = NEW_CONTENT; /* the guest still runs there, and writes */
    CHECK(pwrite(move->source_fd, &content, sizeof(content), (off_t)move->page_bytes) == sizeof(content));
    source_open(move->source);
    struct frame_header answer;
    CHECK(recv(move->urgent[0], &answer, sizeof(answer), MSG_WAITALL) == sizeof(answer) && answer.kind == FRAME_PAGES);
    CHECK(recv(move->urgent[0], &content, sizeof(content), MSG_WAITALL) == sizeof(content));
    CHECK(content == NEW_CONTENT);
    source_stop(move->source);
    pthread_join(move->serve, NULL);
    move_end(move);
}

static void *touch_page_5(void *of)
{
    struct move *move = of;
    uint64_t seen = *(volatile uint64_t *)(move->guest + 5 * move->page_bytes);
    CHECK(seen == stamp(5));
    return NULL;
}

static void early_finish(struct move *move)
{
    move_begin(move);
    pthread_t toucher;
    pthread_create(&move->fault, NULL, run_fault, move);
    pthread_create(&toucher, NULL, touch_page_5, move);
    struct destination_figures figures = {0};
    while (figures.requests_sent == 0)
        destination_read(move->destination, &figures);
    struct loop_result result;
    destination_finish(move->destination, &result);
    bool refused = result.reason == LOOP_INCOMPLETE;
    pthread_create(&move->serve, NULL, run_serve, move);
    source_open(move->source);
    pthread_join(toucher, NULL); /* which has checked what it read */
    CHECK(refused);
    destination_stop(move->destination);
    pthread_join(move->fault, NULL);
    source_stop(move->source);
    pthread_join(move->serve, NULL);
    move_end(move);
}

int main(int argc, char **argv)
{
    alarm(30);
    struct move move = {.page_count = 64, .page_bytes = 4096};
    if (argc == 2 && strcmp(argv[1], "gate") == 0)
        gate(&move);
    else if (argc == 2 && strcmp(argv[1], "early-finish") == 0)
        early_finish(&move);
    else
        return main_of_the_data_plane(argc, argv);
    printf("%s: held\n", argv[1]);
    return 0;
}
