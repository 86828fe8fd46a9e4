/* fault-kvm: the way of one page as in fault-idle, but it is a KVM guest that touches it. The guest is the product's own machine and program
 * (migrate/guests/kvm), moved by hand: it fills one memory and is paused, its state is loaded over another one that is empty, and there it
 * goes over all of its pages. What is compared is the way in between, so the latencies are those that the guest itself measures. */
#include "floor.h"
#include "histogram.h"
#include "machine.h"

#include <poll.h>
#include <unistd.h>

static uint8_t state[MACHINE_STATE_BYTES_MAX];

static struct machine *machine_over(const void *memory, uint64_t size_bytes)
{
    struct machine *machine;
    const char *step;
    struct machine_region region = {.address = (uint64_t)memory, .size_bytes = size_bytes};
    int result = machine_create(&machine, &region, 1, 1, &step);
    floor_check(result == 0, step);
    return machine;
}

static void await_event(const struct machine *machine)
{
    uint64_t count;
    struct pollfd event = {.fd = machine_event_fd(machine), .events = POLLIN};
    floor_expect(poll(&event, 1, -1) == 1 && read(event.fd, &count, sizeof count) == sizeof count, "an event of the machine");
}

static int64_t first_life(const struct floor_world *world)
{
    struct machine_config config = {.seed = world->options.seed, .beat_steps = 32};
    struct machine *machine = machine_over(world->source_memory, world->options.memory_bytes);
    floor_check(machine_start(machine, &config) == 0, "the machine's start");
    while (machine_first_step_ns(machine) == 0)
        await_event(machine);
    floor_check(machine_pause(machine, UINT64_MAX) == 0, "the machine's pause");
    int64_t size_bytes = machine_save(machine, state, sizeof state);
    floor_check(size_bytes > 0, "the machine's state");
    machine_destroy(machine);
    return size_bytes;
}

void floor_kvm_guest(struct floor_world *world)
{
    struct floor_memory memory;
    struct floor_report *report = world->report;
    struct machine_report told;
    const char *why;
    char byte;
    int64_t size_bytes = first_life(world);
    floor_send(world->guest_end[1], "m", 1, 0); /* the source's memory is final */
    floor_guest_create(world, &memory);
    struct machine *machine = machine_over(memory.mapping, world->options.memory_bytes);
    floor_check(machine_load(machine, state, (size_t)size_bytes, &why) == 0, "the load of the state");
    floor_check(floor_receive(world->guest_end[0], &byte, 1) == 1, "the word to start");
    machine_resume(machine);
    machine_verify(machine);
    for (machine_read(machine, &told); told.verifications == 0; machine_read(machine, &told)) {
        floor_check(told.phase == MACHINE_RUNNING, "the guest's memory");
        await_event(machine);
    }
    machine_destroy(machine);
    for (uint32_t bucket = 0; bucket < HISTOGRAM_BUCKETS; bucket++)
        for (uint64_t i = 0; i < told.first_touch.bucket[bucket] && report->count < world->options.touches; i++)
            report->latency_ns[report->count++] = histogram_bucket_low_ns(bucket);
    report->touched = world->pages;
    (void)*(const volatile char *)(memory.mapping + memory.pages * PAGE_BYTES);
}
