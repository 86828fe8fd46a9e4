/* hops: the messages of a switchover over the product's four hops, and no memory at all.
 *   daemon of A ─pause 32─> guest A ─paused 300─> daemon of A ═switchover 400═> daemon of B ─resume 300─> guest B
 * Each guest is an agent thread that reads its socket and a worker that counts steps: busy while the guest runs, asleep on a
 * futex while it does not. Downtime: the last step of one worker to the first of the other. Then B is the busy one: back.
 * Between two moves the worker runs RUN_NS, so that every other thread is as fast asleep as it is before a real pause. */
#include "floor.h"
#include "histogram.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#define RUN_NS 1000000u

enum {
    PAUSE_BYTES = 32,
    RUNNING_BYTES = 32,
    PAUSED_BYTES = 300,
    RESUME_BYTES = 300,
    SWITCHOVER_BYTES = 400,
    MESSAGE_BYTES_MAX = 400,
};

/* PARKED ─agent─> RESUMED ─worker, after RUN_NS─> RUNNING ─agent─> PAUSING ─worker─> PARKED. The futex word of both threads. */
enum { PARKED, RESUMED, RUNNING, PAUSING };

struct guest {
    _Atomic uint32_t phase;
    uint64_t steps, first_step_ns, last_step_ns;
};

static void enter(struct guest *self, uint32_t phase)
{
    atomic_store(&self->phase, phase);
    floor_expect(syscall(SYS_futex, &self->phase, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0) >= 0, "FUTEX_WAKE");
}

static void wait_while(struct guest *self, uint32_t phase)
{
    while (atomic_load(&self->phase) == phase)
        floor_expect(syscall(SYS_futex, &self->phase, FUTEX_WAIT_PRIVATE, phase, NULL, NULL, 0) == 0 || errno == EAGAIN ||
                         errno == EINTR, "FUTEX_WAIT");
}

static void *worker(void *argument)
{
    struct guest *self = argument;
    for (;;) {
        wait_while(self, PARKED);
        self->steps++;
        self->first_step_ns = clock_monotonic_ns();
        for (uint32_t phase; (phase = atomic_load_explicit(&self->phase, memory_order_acquire)) != PAUSING;) {
            self->steps++;
            if (phase == RESUMED && self->steps % 256 == 0 && clock_monotonic_ns() - self->first_step_ns >= RUN_NS)
                enter(self, RUNNING);
        }
        self->last_step_ns = clock_monotonic_ns();
        enter(self, PARKED);
    }
    return NULL;
}

static void expect_message(int socket_fd, size_t size_bytes)
{
    char message[MESSAGE_BYTES_MAX];
    floor_check(floor_receive(socket_fd, message, size_bytes) == size_bytes, "the peer's message");
}

static void send_message(int socket_fd, size_t size_bytes)
{
    static const char message[MESSAGE_BYTES_MAX];
    floor_send(socket_fd, message, size_bytes, 0);
}

static void run_guest(struct floor_world *world, unsigned side)
{
    static struct guest self;
    int socket_fd = world->guest_end[side];
    pthread_t thread;
    atomic_init(&self.phase, side == 0 ? RESUMED : PARKED);
    errno = pthread_create(&thread, NULL, worker, &self);
    floor_expect(errno == 0, "pthread_create");
    for (uint64_t move = 0; move < world->options.touches; move++) {
        uint64_t *latency_ns = &world->report->latency_ns[move]; /* holds the last step's time until the first's comes */
        if (move % 2 == side) {
            wait_while(&self, RESUMED);
            send_message(socket_fd, RUNNING_BYTES);
            expect_message(socket_fd, PAUSE_BYTES);
            atomic_store(&self.phase, PAUSING); /* the worker is awake: nobody to wake */
            wait_while(&self, PAUSING);
            *latency_ns = self.last_step_ns;
            send_message(socket_fd, PAUSED_BYTES);
        } else {
            expect_message(socket_fd, RESUME_BYTES);
            enter(&self, RESUMED);
            wait_while(&self, RESUMED);
            *latency_ns = self.first_step_ns - *latency_ns;
            world->report->count = move + 1;
        }
    }
}

static void run_daemon(struct floor_world *world, unsigned side)
{
    int guest_socket = world->daemon_end[side];
    int peer = side == 0 ? floor_accept(world->listener) : floor_connect(world);
    for (uint64_t move = 0; move < world->options.touches; move++) {
        if (move % 2 == side) {
            expect_message(guest_socket, RUNNING_BYTES);
            send_message(guest_socket, PAUSE_BYTES);
            expect_message(guest_socket, PAUSED_BYTES);
            send_message(peer, SWITCHOVER_BYTES);
        } else {
            expect_message(peer, SWITCHOVER_BYTES);
            send_message(guest_socket, RESUME_BYTES);
        }
    }
}

static void guest_a(struct floor_world *world) { run_guest(world, 0); }
static void guest_b(struct floor_world *world) { run_guest(world, 1); }
static void daemon_a(struct floor_world *world) { run_daemon(world, 0); }
static void daemon_b(struct floor_world *world) { run_daemon(world, 1); }

void floor_hops(struct floor_world *world)
{
    floor_start("daemon A", daemon_a, world);
    floor_start("daemon B", daemon_b, world);
    floor_start("guest A", guest_a, world);
    floor_start("guest B", guest_b, world);
}
